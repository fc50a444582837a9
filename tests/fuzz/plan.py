"""Which case a number stands for: a seed, and what is done to it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.corpus import CONTAINERS, Seed
from tests.fuzz.mutators import folder, hdf5, npz, pth, raw, safetensors
from tests.fuzz.sample import Mutator, Sample

STRUCTURED: dict[str, dict[Mutator, int]] = {
    "safetensors": safetensors.MUTATORS,
    "npz": npz.MUTATORS,
    "pth": pth.MUTATORS,
    "h5": hdf5.OF_H5,
    "keras": hdf5.OF_KERAS,
    "orbax": folder.OF_ORBAX,
    "hf": folder.OF_HF,
}
RAW_SHARE = {"safetensors": 54, "npz": 54, "pth": 54, "h5": 14, "keras": 10, "orbax": 12, "hf": 32}
"""How many cases of a round change bytes alone; opening Keras's and orbax's files takes long."""

STACKED = 0.1
"""Share of the cases in which bytes are changed after all else."""


class Case(NamedTuple):
    """What a number stands for."""

    number: int
    seed: Seed
    mutators: tuple[Mutator, ...]

    @property
    def name(self) -> str:
        """For people."""
        return (
            f"{self.number}: {self.seed.name}, {', then '.join(m.__name__ for m in self.mutators)}"
        )


@cache
def a_round() -> list[tuple[str, Mutator]]:
    """Containers and mutators, each as often as it should be; every round has the same."""
    rows: list[tuple[str, Mutator]] = []
    for container in CONTAINERS:
        for mutator, weight in STRUCTURED[container].items():
            rows += [(container, mutator)] * weight
        often = [m for m, weight in raw.MUTATORS.items() for _ in range(weight)]
        rng = random.Random(container)
        rng.shuffle(often)
        rows += [(container, mutator) for mutator in often[: RAW_SHARE[container]]]
    random.Random(0).shuffle(rows)  # so that the slow ones do not come all at once
    return rows


def case_of(number: int, seeds: Sequence[Seed]) -> Case:
    """The case of a number, always the same."""
    rng = random.Random(f"isovit case {number}")
    container, mutator = a_round()[number % len(a_round())]
    if number >= len(a_round()) and mutator in raw.MUTATORS:
        mutator = rng.choices(list(raw.MUTATORS), list(raw.MUTATORS.values()))[0]
    seed = rng.choice([seed for seed in seeds if seed.container == container])
    mutators = (mutator,)
    if rng.random() < STACKED and mutator not in raw.MUTATORS:
        mutators += (rng.choice(BYTES),)
    return Case(number, seed, mutators)


BYTES = [raw.flip_a_bit, raw.flip_bits, raw.write_a_number, raw.truncate, raw.zero_a_range]


def make(case: Case, seeds: Sequence[Seed], corpus: Path, work: Path) -> Sample:
    """The file of a case, in a folder of its own."""
    sample = Sample(case.seed, corpus, seeds, work)
    rng = random.Random(f"isovit bytes {case.number}")
    for mutator in case.mutators:
        mutator(sample, rng)
    if len(case.mutators) > 1:
        sample.must = "fail" if sample.must == "fail" else ""
    return sample
