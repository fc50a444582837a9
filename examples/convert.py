"""Weights from one framework to another: a torch state dict becomes a Keras and a Flax file.

The path is always the same: any format in, canonical weights, any format out. Nothing is computed,
so nothing is rounded: what comes back is equal bit for bit.
"""

import tempfile
from pathlib import Path

import numpy as np

import isovit
from isovit.weight_convert.store import inspect


def main() -> None:
    """Write a torch checkpoint, convert it twice, and compare what comes back."""
    config = isovit.config("t2t_vit_7", num_classes=10)
    ours = isovit.Checkpoint(config, isovit.init(config, seed=0))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        source = folder / "model.pth"  # with a checkpoint of your own, start from its path
        isovit.save(ours, source, format="yitu")

        # A file that isovit did not write says neither model nor format: load(..., config=config).
        checkpoint = isovit.load(source)
        for name in ("model.weights.h5", "model.npz", "model.safetensors"):
            isovit.save(checkpoint, folder / name)
            found = inspect(folder / name)
            again = isovit.load(folder / name).weights
            same = all(np.array_equal(again[path], array) for path, array in ours.weights.items())
            print(
                f"{source.name} ({checkpoint.source.format}) -> {name} ({found.format}): ", end=""
            )
            print(f"{found.parameters:,} numbers, {'equal bit for bit' if same else 'NOT equal'}")
            assert same


if __name__ == "__main__":
    main()
