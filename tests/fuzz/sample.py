"""What a mutator gets: a copy of a seed, and a place of its own around it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.corpus import Seed

Rng = random.Random


@dataclass
class Sample:
    """A copy of a seed, to be changed.

    Attributes:
        seed: what it is a copy of.
        corpus: folder of all seeds.
        seeds: all of them.
        work: the folder of this case: ``in`` has the copy, ``outside`` what it must not reach,
            ``out`` and ``tmp`` are empty.
        must: ``succeed`` or ``fail`` where the mutation leaves no choice.
    """

    seed: Seed
    corpus: Path
    seeds: Sequence[Seed]
    work: Path
    must: str = ""
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        for name in ("in", "out", "tmp", "outside"):
            (self.work / name).mkdir(parents=True)
        self.path = self.work / "in" / self.seed.name
        copy(self.corpus / self.seed.name, self.path)

    @property
    def trap(self) -> Path:
        """A file that exists if code of the checkpoint ran."""
        return self.work / "outside" / "ran"

    def file(self, rng: Rng) -> Path:
        """The file, or any file of the folder."""
        if not self.path.is_dir():
            return self.path
        # By size: some names are drawn by the library that writes them.
        files = [path for path in self.path.rglob("*") if path.is_file()]
        return rng.choice(sorted(files, key=lambda path: (path.stat().st_size, path.name)))

    def other(self, rng: Rng) -> bytes:
        """The content of another seed, of any container."""
        seed = rng.choice([s for s in self.seeds if (self.corpus / s.name).is_file()])
        return (self.corpus / seed.name).read_bytes()

    def replace(self, source: Path) -> None:
        """Put another file or folder in its place."""
        remove(self.path)
        copy(source, self.path)


Mutator = Callable[[Sample, Rng], None]


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
