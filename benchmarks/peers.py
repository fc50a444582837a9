"""isovit beside the public code of the same models, in one run, taking turns.

Usage: python benchmarks/peers.py [MODEL…] [--batch 8] [--mode infer|train] [--rounds 15]
                                  [--lanes torch,flax,…] [--memory kept,returned] [--out FILE.json]

Each lane, a model in one implementation, and each library's matrix product is a process of its own
that waits for its turn. Machines drift, so the fastest product has a turn before and after each
turn of a lane, and a lane is timed in products: utilisation is how many fit the operations of a
forward pass, over how many fit the time of a step. Medians over the rounds, with their intervals,
are the record. All lanes of a model have the same weights, and a lane whose output is not that of
the public code takes no part.

isovit's lanes keep memory (``isovit.keep_memory``) unless told otherwise; the public code runs
eagerly as it comes and, as a second lane, with memory kept; onnxruntime has memory of its own.

The public code: of T2T-ViT, the official one, rewritten for the tests from its description
(``parity_tests/oracles/yitu.py``: it is no package); vit-pytorch for its own T2T-ViT; timm for ViT.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

import isovit
from isovit.backends import get_backend, quiet
from isovit.backends.devices import worker_environment
from isovit.backends.memory import Memory, can_keep_memory, usual_memory
from isovit.benchmarks import worker
from isovit.benchmarks.driver import FORWARD_ONLY, LIBRARIES, WAYS, installed, start
from isovit.benchmarks.measure import middle, summary
from isovit.benchmarks.records import (
    Beside,
    Case,
    Mode,
    Product,
    Record,
    Result,
    Run,
    Timing,
)
from isovit.cli.bench import keeper
from isovit.errors import InputError
from isovit.parity.budgets import LIMITS
from isovit.parity.compare import error
from isovit.parity.job import draw_inputs
from isovit.spec.families import param_tree
from isovit.versions import versions
from isovit.weight_convert.checkpoint import Checkpoint
from isovit.weight_convert.store import save

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the oracles of the tests

MODELS = ("t2t_vit_14", "t2t_vit_t_14", "t2t_vit_7", "t2t_vit_pytorch", "vit_s16")
PUBLIC = "public"
PAUSE_S = 0.1
"""Between turns: the threads of a lane spin for a while before they sleep."""

TURN_S, PRODUCT_TURN_S = 0.6, 0.3
"""A turn of a lane and of a product lasts so long, or one step."""

REHEARSALS = 5
"""Turns of every library's product before a model, which say whose is the fastest."""


# The public models


def public(model: str) -> tuple[Any, str]:
    """The public torch model of a variant, and the format of its weights."""
    from parity_tests.oracles.importing import mend_torchvision

    mend_torchvision()
    config = isovit.config(model)
    if model == "t2t_vit_pytorch":
        from vit_pytorch.t2t import T2TViT

        layers = tuple((split.kernel, split.stride) for split in config.t2t_layers)
        return T2TViT(
            image_size=config.image_size[0], num_classes=config.num_classes, dim=config.embed_dim,
            depth=config.depth, heads=config.num_heads, mlp_dim=config.mlp_dim,
            t2t_layers=layers,
        ), "vit_pytorch"  # fmt: skip
    if model.startswith("t2t"):
        from parity_tests.oracles import yitu

        return yitu.T2TViT(
            img_size=config.image_size[0], tokens_type=config.token_mixer, in_chans=3,
            num_classes=config.num_classes, embed_dim=config.embed_dim, depth=config.depth,
            num_heads=config.num_heads, mlp_ratio=config.mlp_dim / config.embed_dim, token_dim=64,
        ), "yitu"  # fmt: skip
    import timm

    size, patch = model.removeprefix("vit_")[:-2], model[-2:]
    name = f"vit_{ {'ti': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}[size] }_patch{patch}_224"
    return timm.create_model(name, pretrained=False), "timm"


def public_model(checkpoint: Checkpoint, model: str) -> Any:
    """The public model with weights of ours, loaded strictly."""
    import torch

    module, format = public(model)
    with tempfile.TemporaryDirectory(prefix="isovit-") as folder:
        path = Path(folder) / "weights.pth"
        save(checkpoint, path, format)
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    return module.eval()


def public_step(
    case: Case, checkpoint: Checkpoint, images: np.ndarray
) -> tuple[Callable[[], Any], float]:
    """A step of the public model, a forward pass or one of training; and the seconds for images."""
    import torch

    module = public_model(checkpoint, case.model)
    x, transfer_s = worker.timed(lambda: torch.tensor(images).permute(0, 3, 1, 2).contiguous())
    return _public_step(case, module, x), transfer_s


def _public_step(case: Case, module: Any, x: Any) -> Callable[[], Any]:
    import torch

    if case.mode == "train":
        labels = torch.tensor(labels_of(case))
        return get_backend("torch").training(module, x, labels, case.way)
    if case.way == "onnxruntime":
        return _onnxruntime(module, x)
    run = torch.compile(module) if case.way == "compile" else module

    def step() -> Any:
        with torch.inference_mode():
            return run(x).numpy()

    return step


def _onnxruntime(module: Any, x: Any) -> Callable[[], Any]:
    import onnxruntime
    import torch

    with tempfile.TemporaryDirectory(prefix="isovit-") as folder, quiet():
        path = Path(folder) / "model.onnx"
        batch = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.onnx.export(
            module, (x[:2],), dynamo=True, dynamic_shapes=batch, input_names=["x"], verbose=False
        )
        assert program is not None
        program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


# A lane


def labels_of(case: Case) -> np.ndarray:
    """The classes of a batch, for a step of training: one after another."""
    return np.arange(case.batch) % isovit.config(case.model).num_classes


def lane_step(
    case: Case, checkpoint: Checkpoint, images: np.ndarray
) -> tuple[Callable[[], Any], float]:
    """What a lane does in its turn, and the seconds that it takes to hand it the images."""
    if case.backend == PUBLIC:
        return public_step(case, checkpoint, images)
    backend = get_backend(case.backend)
    backend.exact_arithmetic()
    model = backend.build(checkpoint.config, checkpoint.weights, device=case.device)
    x, transfer_s = worker.timed(lambda: backend.put(model, images))
    if case.mode == "train":
        labels = backend.put(model, labels_of(case))
        return backend.training(model, x, labels, case.way), transfer_s
    return backend.inference(model, x, case.way), transfer_s


def serve() -> None:
    """Be a lane: a case or a library comes in, then the seconds of each turn; times go out."""
    job = msgspec.json.decode(sys.stdin.readline(), type=worker.Job)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(content: object) -> None:
        answers.write(msgspec.json.encode(content).decode() + "\n")
        answers.flush()

    job.settle_memory()
    case = job.case
    if case is None:
        square = np.random.default_rng(0).standard_normal((worker.PRODUCT_SIZE,) * 2, np.float32)
        step, ready = worker.PRODUCTS[str(job.library)](square, job.device), {}
    else:
        config = isovit.config(case.model)
        checkpoint = Checkpoint(config, isovit.init(config, seed=0))
        images = draw_inputs(config, case.batch, seed=0)[0]
        before = worker.peak_memory()
        (step, transfer_s), build_s = worker.timed(lambda: lane_step(case, checkpoint, images))
        output, first_s = worker.timed(step)
        step()
        ready = {
            "output": np.asarray(output, np.float64).tolist(),
            "build_s": build_s,
            "transfer_ms": 1e3 * transfer_s,
            "first_call_s": first_s,
            "host_bytes": worker.peak_memory() - before,
        }
    step()
    answer({**ready, "page_faults": worker.page_faults(step)})
    for seconds in sys.stdin:
        times: list[float] = []
        start = time.perf_counter()
        while not times or time.perf_counter() - start < float(seconds):
            times.append(1e3 * worker.timed(step)[1])
        answer(times)


# The driver


@dataclass
class Lane:
    """A process that waits for its turns.

    Attributes:
        job: what it does.
        turns: times in ms, of each turn.
        products_ms: time of a product, around each turn.
        ready: what it said of its start.
    """

    job: worker.Job
    turns: list[list[float]] = field(default_factory=list[list[float]])
    products_ms: list[float] = field(default_factory=list[float])
    ready: dict[str, Any] = field(default_factory=dict[str, Any])

    def start(self) -> str:
        """Start the process; gives the reason if it could not."""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the lane
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--lane"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=worker_environment("cpu", os.environ),
        )
        said = self._ask(msgspec.json.encode(self.job))
        if said is None:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else "it ended"
        self.ready = said
        return ""

    def turn(self) -> float:
        """Let it run for a turn; gives the median of its times in ms."""
        seconds = PRODUCT_TURN_S if self.job.case is None else TURN_S
        times = self._ask(str(seconds).encode()) or [float("nan")]
        self.turns.append(times)
        time.sleep(PAUSE_S)
        return statistics.median(times)

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _ask(self, line: bytes) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline()
        return msgspec.json.decode(said) if said else None

    @property
    def turn_ms(self) -> list[float]:
        """The median of each turn."""
        return [statistics.median(times) for times in self.turns]

    @property
    def in_products(self) -> list[float]:
        """The median of each turn, over the time of a product around it."""
        return [a / b for a, b in zip(self.turn_ms, self.products_ms, strict=True)]


def lanes_of(
    model: str, batch: int, mode: Mode, chosen: Sequence[str] | None, kinds: Sequence[Memory]
) -> list[Lane]:
    """The lanes of a model, the public code first."""
    rows: list[tuple[str, str, Memory]] = [(PUBLIC, "eager", "returned")]
    if can_keep_memory():
        rows.append((PUBLIC, "eager", "kept"))
    if mode == "infer":
        rows.append((PUBLIC, "onnxruntime", "returned"))
    for name in installed():
        ways = [way for way in WAYS[name] if way not in ("compile", "torchax")]
        rows.extend((name, way, kind) for way in ways for kind in kinds)
    cases = [
        Case(model=model, backend=name, way=way, mode=mode, batch=batch, memory=memory)
        for name, way, memory in rows
        if (name == PUBLIC or chosen is None or name in chosen)
        and (mode == "infer" or (name, way) not in FORWARD_ONLY)
    ]
    return [Lane(worker.Job(limit_s=0.0, case=case)) for case in cases]


def compare(
    run: Run,
    models: Sequence[str],
    batch: int,
    mode: Mode,
    rounds: int,
    chosen: Sequence[str] | None,
    kinds: Sequence[Memory],
    keep: Callable[[Run], None],
) -> None:
    """Measure all lanes of all models, one model after another; ``keep`` saves what there is."""
    products = [
        Lane(worker.Job(limit_s=0.0, library=library))
        for library, module in LIBRARIES.items()
        if find_spec(module)
    ]
    for lane in products:
        if problem := lane.start():
            raise SystemExit(f"product in {lane.job.library}: {problem}")
    for model in models:
        running = _started(lanes_of(model, batch, mode, chosen, kinds), run)
        _take_turns(running, products, rounds)
        _report(model, mode, running, run)
        for lane in running:
            lane.end()
        run.products = [
            Product(
                library=str(lane.job.library),
                gflops=2 * worker.PRODUCT_SIZE**3 / min(lane.turn_ms) / 1e6,
            )
            for lane in products
        ]
        keep(run)
    for lane in products:
        lane.end()


def _take_turns(lanes: list[Lane], products: list[Lane], rounds: int) -> None:
    for _ in range(REHEARSALS):
        for lane in products:
            lane.turn()
    fastest = min(products, key=lambda lane: statistics.median(lane.turn_ms[-REHEARSALS:]))
    before = fastest.turn()
    for _ in range(rounds):
        for lane in lanes:
            lane.turn()
            after = fastest.turn()
            lane.products_ms.append((before + after) / 2)
            before = after


def _started(lanes: list[Lane], run: Run) -> list[Lane]:
    """Those that run and compute what the first does; what others said goes into the records."""
    running: list[Lane] = []
    for lane in lanes:
        case = lane.job.case
        assert case is not None
        problem = lane.start()
        if not problem and running and case.mode == "infer":
            wanted, found = (np.asarray(x.ready["output"]) for x in (running[0], lane))
            off = error(found, wanted)
            if off > LIMITS["float32"]["output"]:
                problem = f"its output is not that of the public code: error {off:.1e}"
        if problem:
            run.put(Record(case=case, error=problem, versions=versions()))
            print(
                f"{case.model} {case.backend} {case.way}, {case.memory}: {problem}", file=sys.stderr
            )
            lane.end()
        else:
            running.append(lane)
    return running


def _report(model: str, mode: Mode, lanes: list[Lane], run: Run) -> None:
    """Put the records of a model into the run and print its table."""
    config = isovit.config(model)
    multiply_adds = param_tree(config).multiply_adds()
    first = lanes[0].in_products
    print(f"\n{model}, {mode}: ms, times faster than the public code, fraction")
    for lane in lanes:
        case = lane.job.case
        assert case is not None
        operations = 2 * case.batch * multiply_adds
        products = operations / (2 * worker.PRODUCT_SIZE**3)
        faster = middle([a / b for a, b in zip(first, lane.in_products, strict=True)])
        utilisation = middle([products / time for time in lane.in_products])
        beside = Beside(
            faster=faster.median,
            faster_interval=(faster.low, faster.high),
            utilisation=utilisation.median,
            utilisation_interval=(utilisation.low, utilisation.high),
        )
        timing: Timing = summary([ms for times in lane.turns for ms in times])
        result = Result(
            step=timing,
            build_s=lane.ready["build_s"],
            first_call_s=lane.ready["first_call_s"],
            transfer_ms=lane.ready["transfer_ms"],
            host_bytes=lane.ready["host_bytes"],
            device_bytes=None,
            operations=operations,
            weight_bytes=4 * param_tree(config).count(),
            page_faults=lane.ready["page_faults"],
        )
        run.put(Record(case=case, result=result, versions=versions(), beside=beside))
        name = f"{case.backend} {case.way}, {case.memory}"
        memory = lane.ready["host_bytes"] / 1e6
        print(
            f"  {name:<34}{timing.median_ms:8.1f}"
            f" {faster.median:6.2f} ({faster.low:.2f} to {faster.high:.2f})"
            f" {utilisation.median:6.2f} ({utilisation.low:.2f} to {utilisation.high:.2f})"
            f"  {memory:6.0f} MB",
            flush=True,
        )


def main() -> None:
    """Read the options, measure, keep the record."""
    parser = argparse.ArgumentParser(description="isovit beside the public code, taking turns")
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lanes", help="backends of isovit, with commas; else all")
    told = "of isovit's lanes: kept, returned or both"
    parser.add_argument("--memory", default=usual_memory(), help=told)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lane", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.lane:
        serve()
        return
    chosen = options.lanes.split(",") if options.lanes else None
    kinds = options.memory.split(",")
    if not set(kinds) <= set(get_args(Memory)):
        parser.error(f"--memory {options.memory}: wanted {', '.join(get_args(Memory))} or both")
    try:  # other models, or the other mode, may be there of an earlier call
        run = start(options.out, "python benchmarks/peers.py")
    except InputError as error:
        parser.error(str(error))
    run.started = datetime.now(UTC).isoformat(timespec="seconds")
    keep = keeper(options.out)
    batch, mode, rounds = options.batch, options.mode, options.rounds
    compare(run, options.models, batch, mode, rounds, chosen, kinds, keep)
    rates = ", ".join(f"{p.library} {p.gflops:.0f}" for p in run.products)
    print(f"\nproducts of 2048³, GFLOP/s: {rates}")


if __name__ == "__main__":
    main()
