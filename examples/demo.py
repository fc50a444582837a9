"""One photograph through T2T-ViT-14 in every framework, then the proof that all are one function.

The weights are those of seed 0: nothing is downloaded, so the classes mean nothing; that they are
the same classes with the same logits is the point.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

MODEL = "t2t_vit_14"
PHOTOGRAPH = Path(__file__).with_name("chelsea.png")
BACKENDS = ["torch", "flax", "keras:tensorflow", "keras:jax", "keras:torch"]


def isovit(*arguments: str) -> None:
    """Run the command line."""
    subprocess.run([sys.executable, "-m", "isovit", *arguments], check=True)


def main() -> None:
    """Print the top classes in each framework side by side, then the parity table."""
    logits: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in BACKENDS:
            print(f"running {MODEL} in {backend} ...", flush=True)
            output = Path(folder) / f"{backend.replace(':', '-')}.npy"
            options = ["--images", str(PHOTOGRAPH), "--output", str(output)]
            isovit("run", MODEL, "--backend", backend, *options)
            logits[backend] = np.load(output)[0]
    print(f"\nlogits of {PHOTOGRAPH.name}, float32, the five largest of {MODEL}:\n")
    print("class  " + "  ".join(f"{name:>16}" for name in BACKENDS))
    for label in np.argsort(-logits["torch"])[:5]:
        print(f"{label:5}  " + "  ".join(f"{logits[name][label]:16.7f}" for name in BACKENDS))
    print("\nand the proof, in float64, with every activation and every gradient:\n", flush=True)
    options = ["--images", str(PHOTOGRAPH), "--gradients", "--backends", ",".join(BACKENDS)]
    isovit("parity", MODEL, *options)


if __name__ == "__main__":
    main()
