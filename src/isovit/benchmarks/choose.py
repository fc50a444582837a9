"""The backend for a model on this device, from measurements: which, how sure, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from isovit.backends.memory import Memory
from isovit.benchmarks.records import Record, Run
from isovit.errors import InputError

Objective = Literal["latency", "throughput", "memory"]

BATCHES: dict[Objective, tuple[int, ...]] = {
    "latency": (1,),
    "throughput": (1, 8, 32),
    "memory": (1,),
}
"""What is measured for each objective, unless the user says otherwise."""

UNITS: dict[Objective, str] = {"latency": "ms", "throughput": "images/s", "memory": "MB"}


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """A way to run a model, with the figure that counts.

    Attributes:
        backend: with its engine.
        way: to run it.
        batch: at which the figure is best.
        memory: kept or returned.
        value: in the unit of the objective.
        low: lower end of its 95% confidence interval.
        high: upper end; memory has no interval.
    """

    backend: str
    way: str
    batch: int
    memory: Memory
    value: float
    low: float
    high: float


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A ranking, the best first.

    Attributes:
        model: that was measured.
        objective: that counts.
        options: the best way of each backend.
        failed: a line for each backend that could not run.
    """

    model: str
    objective: Objective
    options: tuple[Option, ...]
    failed: tuple[str, ...]

    @property
    def best(self) -> Option:
        """The recommendation."""
        return self.options[0]

    @property
    def equals(self) -> tuple[Option, ...]:
        """Others whose interval overlaps the best one's: as good, as far as was measured."""
        return tuple(
            o for o in self.options[1:] if o.low <= self.best.high and o.high >= self.best.low
        )

    def cost(self, option: Option) -> float:
        """How many times worse than the best an option is."""
        ratio = self.best.value / option.value
        return ratio if self.objective == "throughput" else 1 / ratio

    def certainty(self, option: Option) -> str:
        """How sure it is that an option is worse than the best; memory is read once."""
        if self.objective == "memory":
            return "of one reading"
        return "no certain difference" if option in self.equals else "certain"

    def verdict(self) -> list[str]:
        """The recommendation in words, a line each."""
        best, unit = self.best, UNITS[self.objective]
        lines = [
            f"{self.model}: take {best.backend} ({best.way}), "
            f"{best.value:.4g} {unit} at batch {best.batch}"
        ]
        for option in self.options[1:]:
            lines.append(
                f"  {option.backend} ({option.way}) costs {self.cost(option):.2f} times as much: "
                f"{option.value:.4g} {unit} at batch {option.batch}, {self.certainty(option)}"
            )
        return [*lines, *(f"  {line}" for line in self.failed)]

    def code(self, file: str) -> str:
        """Lines to start from with the converted file."""
        framework, _, engine = self.best.backend.partition(":")
        start = START.get(f"{self.best.backend} {self.best.way}", START[framework])
        return start.format(
            backend=self.best.backend,
            engine=engine,
            memory=KEEP if self.best.memory == "kept" else "",
            file=file,
        )


def choose(run: Run, model: str, objective: Objective, backends: Sequence[str]) -> Choice:
    """Rank what a run has of a model by an objective.

    Args:
        run: measured on the device in question.
        model: as the cases name it.
        objective: ``latency``, ``throughput`` or ``memory``.
        backends: that may be taken.

    Raises:
        InputError: if nothing of it has been measured.
    """
    records = [
        record
        for record in run.records
        if record.case.model == model and record.case.backend in backends
    ]
    good = [_option(record, objective) for record in records if record.result]
    if not good:
        raise InputError(f"nothing was measured of {model} in {', '.join(backends)}")
    good.sort(key=lambda option: option.value, reverse=objective == "throughput")
    seen: dict[str, Option] = {}
    for option in good:
        seen.setdefault(option.backend, option)
    failed = {
        f"{record.case.backend} ({record.case.way}) did not run: {record.error}": None
        for record in records
        if record.error
    }
    return Choice(
        model=model, objective=objective, options=tuple(seen.values()), failed=tuple(failed)
    )


def _option(record: Record, objective: Objective) -> Option:
    case, result = record.case, record.result
    assert result is not None
    step = result.step
    if objective == "memory":
        used = result.used_bytes / 1e6
        value, low, high = used, used, used
    elif objective == "throughput":
        value, low, high = (
            1e3 * case.batch / ms for ms in (step.median_ms, step.high_ms, step.low_ms)
        )
    else:
        value, low, high = step.median_ms, step.low_ms, step.high_ms
    return Option(
        backend=case.backend,
        way=case.way,
        batch=case.batch,
        memory=case.memory,
        value=value,
        low=low,
        high=high,
    )


KEEP = "isovit.keep_memory()  # as measured: what a step frees stays with the process\n"
"""Of the lines to start from, the first, where memory was kept."""

START = {
    "torch": """\
import isovit

{memory}ckpt = isovit.load("{file}")
model = isovit.build(ckpt.config, "torch", ckpt.weights)  # torch.nn.Module, evaluation mode
# with torch.inference_mode(): logits = model(images)     # (batch, height, width, channels)
""",
    "torch torchax": """\
import jax
import torchax

import isovit

{memory}ckpt = isovit.load("{file}")
model = isovit.build(ckpt.config, "torch", ckpt.weights)  # torch.nn.Module, evaluation mode
weights, run = torchax.extract_jax(model)
predict = jax.jit(run)
# logits = predict(weights, (images,))                    # (batch, height, width, channels)
""",
    "flax": """\
import jax
from flax import nnx

import isovit

{memory}ckpt = isovit.load("{file}")
model = isovit.build(ckpt.config, "flax", ckpt.weights)  # nnx.Module, evaluation mode
graphdef, state = nnx.split(model)
predict = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
# logits = predict(state, images)                        # (batch, height, width, channels)
""",
    "keras": """\
import os

os.environ["KERAS_BACKEND"] = "{engine}"  # before Keras is imported

import isovit

{memory}ckpt = isovit.load("{file}")
model = isovit.build(ckpt.config, "{backend}", ckpt.weights)  # keras.Model
# logits = model.predict(images)                              # (batch, height, width, channels)
""",
    "keras:torch graph": """\
import os

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import isovit

{memory}ckpt = isovit.load("{file}")
model = isovit.build(ckpt.config, "keras:torch", ckpt.weights)  # keras.Model
trained = [variable.value for variable in model.trainable_variables]
fixed = [variable.value for variable in model.non_trainable_variables]
call = lambda *inputs: model.stateless_call(*inputs, training=False)[0]
record = make_fx(call, tracing_mode="fake")
# with torch.no_grad(): predict = record(trained, fixed, images)  # for images of this shape
# with torch.inference_mode(): logits = predict(trained, fixed, images)
""",
    "onnx": """\
import onnxruntime

# isovit export {file} model.onnx --backend torch
session = onnxruntime.InferenceSession("model.onnx")
# (logits,) = session.run(None, {{"images": images}})  # (batch, height, width, channels)
""",
}
"""How to run the model in each backend, and by a way that wants other lines."""
