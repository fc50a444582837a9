"""What is measured, and what comes of it: JSON that says how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from isovit.backends.memory import Memory
from isovit.errors import InputError, reason
from isovit.weight_convert.files import replacing

Mode = Literal["infer", "train"]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to measure, in a process of its own.

    Attributes:
        model: a variant, a config file or a checkpoint.
        changes: of its config, by field.
        backend: with its engine, ``keras:jax``.
        way: one of the backend's ``WAYS``.
        mode: ``infer``, a forward pass; ``train``, a step of AdamW.
        dtype: of parameters and computation.
        batch: images at a time.
        device: ``cpu``, ``cuda``, ``tpu``.
        memory: of the host, ``kept`` by the process for the next step or ``returned``.
    """

    model: str
    changes: dict[str, Any] = {}
    backend: str
    way: str
    mode: Mode = "infer"
    dtype: str = "float32"
    batch: int = 1
    device: str = "cpu"
    memory: Memory = "returned"


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Repeated measurements of one step.

    Attributes:
        median_ms: of all repeats.
        low_ms: lower end of the 95% confidence interval of the median.
        high_ms: upper end.
        repeats: how many.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int

    @property
    def spread(self) -> float:
        """Half the interval, as a fraction of the median."""
        return (self.high_ms - self.low_ms) / 2 / self.median_ms


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker found for a case.

    Attributes:
        step: of the mode.
        build_s: from weights in memory to a model on the device.
        first_call_s: of tracing, compiling and the first step together.
        compile_s: of tracing and compiling: what the first call took beyond a step.
        transfer_ms: of one batch of images to the device, in the model's dtype; no part of a step.
        host_bytes: largest resident memory of the process beyond that of its imports.
        device_bytes: largest allocation on the device; None where nobody counts.
        operations: floating-point operations of a step's forward pass, two per multiply-add.
        weight_bytes: of the model's weights.
        file_bytes: of the canonical file with the weights and the config.
        page_faults: of one more step: pages of memory that the system had to give to the process.
    """

    step: Timing
    build_s: float
    first_call_s: float
    compile_s: float | None = None
    transfer_ms: float
    host_bytes: int
    device_bytes: int | None
    operations: int
    weight_bytes: int
    file_bytes: int | None = None
    page_faults: int | None = None

    def images_per_s(self, batch: int) -> float:
        """Images that pass in a second."""
        return 1e3 * batch / self.step.median_ms

    @property
    def used_bytes(self) -> int:
        """Most memory in use: of the device, or else of the process."""
        return self.device_bytes or self.host_bytes

    @property
    def gflops(self) -> float:
        """10⁹ operations of the forward pass per second; for ``infer`` that is the whole step."""
        return self.operations / self.step.median_ms / 1e6


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """A case beside others that took turns with it: medians, over the rounds, of a round's ratios.

    A machine that slows down for a while slows all of a round alike.

    Attributes:
        faster: the time of the public code over that of this case.
        utilisation: operations of the forward pass per second, over those of the best product.
        faster_interval: in which that median lies in 95% of runs; None in older records.
        utilisation_interval: likewise.
    """

    faster: float
    utilisation: float
    faster_interval: tuple[float, float] | None = None
    utilisation_interval: tuple[float, float] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A case with its result, or with the line that says why there is none.

    Attributes:
        case: what was measured.
        result: None if it failed.
        error: why.
        versions: of the packages that took part.
        device: that the model ran on, as its framework calls it.
        precision: dtype and the switches of float32 products, read back after they were set.
        beside: how it compares with others of the run, where they took turns.
    """

    case: Case
    result: Result | None = None
    error: str | None = None
    versions: dict[str, str] = {}
    device: str = ""
    precision: str = ""
    beside: Beside | None = None


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """Rate of a 2048³ product of float32 matrices in one library, in 10⁹ operations a second."""

    library: str
    gflops: float
    device: str = "cpu"


class Run(msgspec.Struct, kw_only=True):
    """All that was measured on one device.

    Attributes:
        command: that made it; of several, with semicolons between them.
        started: date and time, ISO 8601.
        device: facts of the machine.
        products: of every library that is installed.
        records: one for each case.
    """

    command: str
    started: str
    device: dict[str, Any]
    products: list[Product] = []
    records: list[Record] = []

    def best_gflops(self, device: str) -> float:
        """The best product rate of any library on a device; 0 if none was measured."""
        rates = (product.gflops for product in self.products if product.device == device)
        return max(rates, default=0.0)

    def utilisation(self, record: Record) -> float | None:
        """Operations of the forward pass over the best product rate; None where unknown.

        The products are float32: a model of another dtype has another best.
        """
        case = record.case
        best = self.best_gflops(case.device)
        if record.result is None or case.mode != "infer" or case.dtype != "float32" or not best:
            return None
        return record.result.gflops / best

    def find(self, case: Case) -> Record | None:
        """The record of a case, if it has been measured."""
        return next((record for record in self.records if record.case == case), None)

    def put(self, record: Record) -> None:
        """Add a record in the place of an older one of its case."""
        self.records = [r for r in self.records if r.case != record.case] + [record]

    def save(self, path: Path) -> None:
        """Write as JSON, all or nothing."""
        text = msgspec.json.format(msgspec.json.encode(self), indent=1)
        with replacing(path) as temporary:
            temporary.write_bytes(text + b"\n")


def load_run(path: Path) -> Run:
    """Read what ``Run.save`` wrote.

    Raises:
        InputError: if it is no such file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Run)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: wanted results of isovit bench: {reason(error)}") from None


def same_device(a: dict[str, Any], b: dict[str, Any], keys: Sequence[str] = ()) -> bool:
    """Whether two runs are of one kind of machine, so that their figures may be compared."""
    keys = keys or ("processor", "cores", "accelerators")
    return all(a.get(key) == b.get(key) for key in keys)
