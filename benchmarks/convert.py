"""Memory and speed of conversion, on files as large as a model has them.

Usage: python benchmarks/convert.py [--model vit_h14] [--folder FOLDER] [--pairs 5] [--require]

Two sources become canonical safetensors: a training file of timm, ``{"model": …}`` in one .pth, and
a folder of Hugging Face in shards of safetensors. Every run is a process of its own. Measured are

- memory: the peak of a process that converts, less the peak of one that only imports the same;
- speed: the bytes of the weights by the time of a conversion, imports left out, as a ratio to
  reading and writing the shards of the same bytes with safetensors alone (``load_file``,
  ``save_file``). Conversion and copy take turns, and the ratio is the median of the pairs.

The result of a conversion is compared with what the source was made of before anything counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np

SOURCES = ("pth", "hf")
"""What is converted: timm's .pth, Hugging Face's shards."""

MOST_MEMORY = 700_000_000
"""Bytes above the imports that a conversion may take."""

LEAST_RATIO = 0.60
"""Speed that a conversion must have, where 1 is that of the copy."""

SHARD_BYTES = 1_000_000_000
RESULTS = Path(__file__).parent / "results"


# The files


def weights(model: str) -> Any:
    """Canonical weights of a model, drawn one by one: the same on every call."""
    import isovit
    from isovit.weight_convert.tensors import Spec, Tensors

    params = isovit.param_tree(isovit.config(model)).parameters()
    specs = {path: Spec(param.shape, np.dtype(np.float32)) for path, param in params.items()}

    def draw(path: str) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        return rng.standard_normal(specs[path].shape, np.float32)

    return Tensors(specs, draw)


def foreign(model: str, format: str) -> Any:
    """The same weights under the names of a format."""
    import isovit
    from isovit.weight_convert.formats import FORMATS, table

    config = isovit.config(model)
    params = isovit.param_tree(config).parameters()
    return table(format, config).write(params, weights(model), FORMATS[format].layout)


def make_pth(model: str, path: Path) -> None:
    """Write ``{"model": …}`` from a scratch file, so that the tensors need not be in memory."""
    import torch

    arrays = foreign(model, "deit")
    scratch = path.with_suffix(".scratch")
    with scratch.open("wb") as file:
        file.truncate(sum(spec.nbytes for spec in arrays.specs.values()))
    state: dict[str, torch.Tensor] = {}
    start = 0
    for name, (shape, dtype) in arrays.specs.items():
        mapped = np.memmap(scratch, dtype, "r+", start, shape)
        mapped[...] = arrays[name]
        state[name] = torch.from_numpy(mapped)
        start += mapped.nbytes
    torch.save({"model": state}, path)
    scratch.unlink()


def make_hf(model: str, path: Path) -> None:
    """Write shards with their index, and the two JSON files beside them."""
    import isovit
    from isovit.spec.families.vit import ViTConfig
    from isovit.weight_convert import files, huggingface

    config = cast("ViTConfig", isovit.config(model))
    arrays = huggingface.prefixed(config, foreign(model, "hf"))
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in arrays.specs.items():
        if filled + spec.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    path.mkdir()
    index: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        shard = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        part = arrays.renamed({name: name for name in names})
        files.write_safetensors(path / shard, part, {"format": "pt"})
        index |= dict.fromkeys(names, shard)
    for name, content in huggingface.sidecars(config).items():
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    told = json.dumps({"metadata": {}, "weight_map": index})
    (path / "model.safetensors.index.json").write_text(told, encoding="utf-8")


def check(model: str, path: Path) -> None:
    """Compare a result with what its source was made of, bit for bit."""
    from isovit.weight_convert.store import opened

    found, wanted = opened(path).weights, weights(model)
    if list(found) != list(wanted):
        raise SystemExit(f"{path}: other names than those that were written")
    for name in wanted:
        if found[name].tobytes() != wanted[name].tobytes():
            raise SystemExit(f"{path}: {name} is not what was written")


# What runs in a process of its own


def load_imports(source: str) -> None:
    """Import what a conversion from a source imports, and do nothing."""
    import safetensors  # noqa: F401

    import isovit.cli.convert
    import isovit.spec.families.vit
    import isovit.weight_convert.families.vit
    import isovit.weight_convert.store  # noqa: F401

    if source == "pth":
        import torch  # noqa: F401


def convert(source: Path, target: Path) -> None:
    """What ``isovit convert`` does."""
    from isovit.weight_convert.store import opened, save

    save(opened(source), target)


def copy(source: Path, target: Path) -> None:
    """Read and write every shard with safetensors alone."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        save_file(load_file(shard), target / shard.name)


def job(words: Sequence[str]) -> None:
    """Do one thing and print its seconds, and the peak memory of the process, as JSON."""
    name, kind, *arguments = words
    load_imports(kind)
    if name == "copy":
        import safetensors.numpy  # noqa: F401
    actions: dict[str, Callable[[], None]] = {
        "imports": lambda: None,
        "make": lambda: {"pth": make_pth, "hf": make_hf}[kind](arguments[0], Path(arguments[1])),
        "check": lambda: check(arguments[0], Path(arguments[1])),
        "convert": lambda: convert(Path(arguments[0]), Path(arguments[1])),
        "copy": lambda: copy(Path(arguments[0]), Path(arguments[1])),
    }
    start = time.perf_counter()
    actions[name]()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The most memory that this process has had at once."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        assert found is not None
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# The measurement


def run(*words: str | Path) -> dict[str, float]:
    """Run a job in a fresh process, with the disk at rest."""
    if hasattr(os, "sync"):
        os.sync()  # or the disk is busy with what an earlier job wrote
    command = [sys.executable, __file__, "--job", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Make the sources in a folder, and measure: one record for each source."""
    paths = {"pth": folder / "timm.pth", "hf": folder / "hf"}
    for source in SOURCES:
        say(f"making {paths[source].name} of {model}")
        run("make", source, model, paths[source])
    nbytes = sum(spec.nbytes for spec in weights(model).specs.values())
    target, copied_to = folder / "model.safetensors", folder / "copy"
    rows: list[dict[str, Any]] = []
    for source in SOURCES:
        say(f"converting {paths[source].name} and comparing the result")
        base, first = run("imports", source), run("convert", source, paths[source], target)
        run("check", "hf", model, target)
        peaks, seconds, copies = [first["peak_bytes"]], [], []
        for i in range(pairs):
            say(f"{source}: pair {i + 1} of {pairs}")
            target.unlink()  # to write over a file takes longer: its old blocks are freed
            shutil.rmtree(copied_to, ignore_errors=True)
            converted = run("convert", source, paths[source], target)
            copied = run("copy", "hf", paths["hf"], copied_to)
            peaks.append(converted["peak_bytes"])
            seconds.append(converted["seconds"])
            copies.append(copied["seconds"])
        rows.append(
            {
                "model": model,
                "source": source,
                "bytes": nbytes,
                "imports_bytes": base["peak_bytes"],
                "peak_bytes": max(peaks),
                "memory_bytes": max(peaks) - base["peak_bytes"],
                "convert_s": seconds,
                "copy_s": copies,
                "ratio": statistics.median(b / a for a, b in zip(seconds, copies, strict=True)),
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """What the measurement ran on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))
        cpu = found[1] if found else cpu
    has_memory = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if has_memory else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that take part."""
    packages = ("isovit", "numpy", "safetensors", "torch")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The records as lines of text."""
    heads = ("memory MB", "limit", "MB/s", "copy MB/s", "ratio", "limit")
    yield "source  " + "".join(f"{head:>12}" for head in heads)
    for row in rows:
        speed, copied = (
            row["bytes"] / statistics.median(row[k]) / 1e6 for k in ("convert_s", "copy_s")
        )
        yield (
            f"{row['source']:8}{row['memory_bytes'] / 1e6:12.0f}{MOST_MEMORY / 1e6:8.0f}"
            f"{speed:10.0f}{copied:12.0f}{row['ratio']:8.2f}{LEAST_RATIO:8.2f}"
        )


def met(row: dict[str, Any]) -> bool:
    """Whether a record is within both limits."""
    return row["memory_bytes"] <= MOST_MEMORY and row["ratio"] >= LEAST_RATIO


def say(line: str) -> None:
    """Tell what is going on, on standard error."""
    print(line, file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    """Measure, print the table, write the records; 1 if a limit is required and missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="vit_h14", help="a ViT, by name")
    parser.add_argument("--folder", type=Path, help="for the files, five times the weights")
    parser.add_argument("--pairs", type=int, default=5, help="of conversion and copy")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--require", action="store_true", help="fail where a limit is missed")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="isovit-bench-", dir=options.folder) as folder:
        rows = measure(options.model, Path(folder), options.pairs)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {
        "date": today,
        "command": " ".join(["python", "benchmarks/convert.py", *words]),
        "machine": machine(),
        "versions": versions(),
        "limits": {"memory_bytes": MOST_MEMORY, "ratio": LEAST_RATIO},
        "records": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"convert-{today}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))
    say(f"wrote {path}")
    return int(options.require and not all(met(row) for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job(sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
