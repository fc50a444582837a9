"""Distillation beside vit-pytorch's wrapper and beside timm's DeiT with the official loss.

The originals get their weights from ours, by the formats of the student's family, and ours get what
they take: the targets, and the logits of a teacher. vit-pytorch's T2T-ViT is mended first, as
``vit_pytorch_student`` says; release 1.26.11 cannot run it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import isovit
from isovit.errors import InputError
from isovit.spec.families import param_tree
from isovit.spec.families.efficient_vit import EfficientViTConfig
from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from isovit.spec.initialize import probe
from isovit.spec.objectives.distill import DistillConfig
from isovit.weight_convert.formats import FORMATS, rename_table
from isovit.weight_convert.tensors import Tensors
from parity_tests.agreement import assert_agree, assert_outputs_agree
from parity_tests.examples import TRAINERS
from parity_tests.families.vit import SMALL
from parity_tests.oracles.families.vit import timm_model
from parity_tests.oracles.importing import import_oracle
from parity_tests.oracles.objectives.distill import deit_loss, of_part, vit_pytorch_student
from parity_tests.strategies import Case
from parity_tests.subject import Subject

pytestmark = pytest.mark.oracles

PYTORCH: dict[str, Any] = dict(head_dim=5, qkv_bias=False, norm_eps=1e-5)
VIT = ViTConfig(**SMALL, **PYTORCH, patch_embed="norm_linear_norm")
T2T = T2TViTConfig(
    image_size=11, t2t_layers=(SoftSplit(3, 2, 1), SoftSplit(3, 2, 1)), token_mixer="full",
    pos_embed="learned", embed_dim=15, depth=2, num_heads=2, mlp_dim=22, num_classes=4, **PYTORCH,
)  # fmt: skip
EFFICIENT = EfficientViTConfig(
    image_size=(12, 8), patch_size=4, embed_dim=15, depth=2, num_heads=2, mlp_dim=22,
    num_classes=4, transformer_norm=True, final_norm="pooled", **PYTORCH,
)  # fmt: skip
DEIT = ViTConfig(**SMALL, dist_token=True, dist_head=True)

WRAPPED: dict[str, DistillConfig] = {
    "soft": DistillConfig(student=VIT, alpha=0.3, temperature=3.0),
    "hard": DistillConfig(student=VIT, alpha=0.3, hard=True),
    "norm": DistillConfig(student=VIT, alpha=0.6, temperature=0.7, dist_norm=True),
    "mean": DistillConfig(
        student=VIT.replace(class_token=False, pool="mean"), temperature=2.0
    ),
    "t2t": DistillConfig(student=T2T, alpha=0.3, temperature=3.0, dist_norm=True),
    "t2t_mean_hard": DistillConfig(student=T2T.replace(pool="mean"), hard=True),
    "efficient": DistillConfig(student=EFFICIENT, alpha=0.3, temperature=3.0),
}  # fmt: skip
"""What ``DistillWrapper`` can be."""

OFFICIAL: dict[str, DistillConfig] = {
    name: DistillConfig(student=DEIT, token="own", alpha=alpha, hard=hard, reduction="numel",
                        temperature=temperature)
    for name, alpha, hard, temperature in [("soft", 0.3, False, 3.0), ("hard", 0.5, True, 1.0)]
}  # fmt: skip
"""What DeiT's own loss can be."""

BATCH = 3


def case_of(config: DistillConfig) -> Case:
    """Three images: with targets of one class and of two."""
    case = Case(config, BATCH)
    entropies = np.count_nonzero(case.others["targets"], axis=1)
    assert set(entropies) == {1, 2}
    return case


def state(case: Case, format: str) -> dict[str, torch.Tensor]:
    """The student's weights under the names of a library."""
    student = case.config.student
    params, weights = param_tree(student).parameters(), of_part(case.weights, "student")
    table = rename_table(format, student)
    arrays = table.write(params, Tensors.of(weights), FORMATS[format].layout)
    return {name: torch.tensor(np.float64(arrays[name])) for name in arrays}


def channels_first(images: np.ndarray) -> torch.Tensor:
    """Images as the originals take them, in float64."""
    return torch.tensor(images).double().permute(0, 3, 1, 2)


class Wrapped:
    """vit-pytorch's wrapper with the weights of a case."""

    def __init__(self, library: Any, case: Case) -> None:
        config, weights = case.config, case.weights
        student = vit_pytorch_student(library, config.student, state(case, "vit_pytorch"))
        self.case = case
        self.model = library.DistillWrapper(
            teacher=None, student=student, temperature=config.temperature, alpha=config.alpha,
            hard=config.hard, mlp_layernorm=config.dist_norm,
        ).double().eval()  # fmt: skip
        ours = {
            "distillation_token": weights["dist_token"][0],
            "distill_mlp.1.weight": weights["head_dist.kernel"].T,
            "distill_mlp.1.bias": weights["head_dist.bias"],
        }
        if config.dist_norm:
            ours["distill_mlp.0.weight"] = weights["norm_dist.scale"]
            ours["distill_mlp.0.bias"] = weights["norm_dist.bias"]
        given = {name: torch.tensor(np.float64(array)) for name, array in ours.items()}
        missing, unexpected = self.model.load_state_dict(given, strict=False)
        assert not unexpected
        assert all(name.startswith("student.") for name in missing)

    def loss(self, images: torch.Tensor, rows: slice) -> torch.Tensor:
        """The loss of some images of the case."""
        targets, teacher_logits = (
            torch.tensor(self.case.others[name][rows]).double()
            for name in ("targets", "teacher_logits")
        )
        self.model.teacher = lambda _: teacher_logits
        return self.model(images[rows], targets)


def wrapped_losses(wrapped: Wrapped) -> np.ndarray:
    """The loss of each image, and last that of the batch."""
    images = channels_first(wrapped.case.images)
    rows = [*(slice(i, i + 1) for i in range(BATCH)), slice(None)]
    with torch.no_grad():
        return np.array([wrapped.loss(images, row).item() for row in rows])


def with_mean(losses: np.ndarray) -> np.ndarray:
    """Losses of images, and last their mean."""
    return np.append(losses, losses.mean())


@pytest.mark.parametrize("name", WRAPPED)
def test_the_losses_are_those_of_vit_pytorchs_wrapper(
    backend: Subject, name: str, pytestconfig: pytest.Config
) -> None:
    case, library = case_of(WRAPPED[name]), import_oracle("vit_pytorch.distill", pytestconfig)
    wanted = wrapped_losses(Wrapped(library, case))
    assert_outputs_agree(with_mean(backend.forward(case)), wanted)


@pytest.mark.parametrize("name", WRAPPED)
def test_the_gradients_are_those_of_vit_pytorchs_wrapper(
    backend: Subject, name: str, pytestconfig: pytest.Config
) -> None:
    """Of the loss of the batch: by the images, and by what the student has not of itself."""
    case, library = case_of(WRAPPED[name]), import_oracle("vit_pytorch.distill", pytestconfig)
    wrapped = Wrapped(library, case)
    images = channels_first(case.images).requires_grad_()
    wrapped.loss(images, slice(None)).backward()
    model = wrapped.model
    wanted = {
        "images": images.grad.permute(0, 2, 3, 1),
        "dist_token": model.distillation_token.grad[None],
        "head_dist.kernel": model.distill_mlp[1].weight.grad.T,
    }
    cotangent = np.full(BATCH, 1 / BATCH)
    found = backend.runtime.gradients(backend.build(case), case.images, cotangent, case.others)
    ours = {"images": found.images, **{path: found.weights[path] for path in [*wanted][1:]}}
    assert_agree(ours, {path: array.numpy() for path, array in wanted.items()}, "gradient")


@pytest.mark.parametrize("name", ["soft", "mean", "t2t"])
def test_the_student_alone_is_vit_pytorchs(
    backend: Subject, name: str, pytestconfig: pytest.Config
) -> None:
    """``to_vit`` there, ``part`` here: the model to keep, without a token for the teacher."""
    case, library = case_of(WRAPPED[name]), import_oracle("vit_pytorch.distill", pytestconfig)
    student = Wrapped(library, case).model.student
    images = channels_first(case.images)
    with torch.no_grad():  # T2T-ViT's is mended and has no such state, but a forward
        wanted = student(images) if name == "t2t" else student.to_vit().double().eval()(images)
    kept = isovit.part(backend.build(case), "student")
    model = backend.runtime.build(kept.config, kept.weights, dtype="float64", device="cpu")
    assert_outputs_agree(backend.runtime.forward(model, case.images), wanted.numpy())


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_losses_are_those_of_timms_deit_and_the_official_loss(
    backend: Subject, name: str, pytestconfig: pytest.Config
) -> None:
    case, timm = case_of(OFFICIAL[name]), import_oracle("timm.models.deit", pytestconfig)
    assert_outputs_agree(with_mean(backend.forward(case)), official_losses(timm, case))


def official_losses(timm: Any, case: Case) -> np.ndarray:
    """The loss of each image, and last that of the batch."""
    model = timm_model(timm, case.config.student).double()
    model.load_state_dict(state(case, "timm"), strict=True)
    model.set_distilled_training()
    model.train()  # two heads come apart in training alone; there is no dropout
    targets, teacher_logits = (
        torch.tensor(case.others[name]).double() for name in ("targets", "teacher_logits")
    )
    rows = [*(slice(i, i + 1) for i in range(BATCH)), slice(None)]
    with torch.no_grad():
        logits, dist_logits = model(channels_first(case.images))
        return np.array(
            [
                deit_loss(
                    (logits[row], dist_logits[row]), targets[row], teacher_logits[row], case.config
                ).item()
                for row in rows
            ]
        )


CHANGES = [
    {"alpha": 0.7},
    {"hard": True},
    {"temperature": 1.0},
    {"reduction": "numel"},
    {"student.norm_eps": 1e-6},
    {"student.activation": "gelu_tanh"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_config_that_is_not_vit_pytorchs_is_seen(
    backend: Subject, change: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    case, library = case_of(WRAPPED["soft"]), import_oracle("vit_pytorch.distill", pytestconfig)
    wanted = wrapped_losses(Wrapped(library, case))
    other = case_of(case.config.replace(**change))
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(with_mean(backend.forward(other)), wanted)


@pytest.mark.parametrize("change", [{"reduction": "batchmean"}, {"alpha": 0.7}], ids=str)
def test_a_config_that_is_not_deits_is_seen(
    backend: Subject, change: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    case, timm = case_of(OFFICIAL["soft"]), import_oracle("timm.models.deit", pytestconfig)
    other = case_of(case.config.replace(**change))
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(with_mean(backend.forward(other)), official_losses(timm, case))


def test_vit_pytorchs_own_student_of_t2t_does_not_run(pytestconfig: pytest.Config) -> None:
    """Why it is mended; a release in which it runs should be compared as it is."""
    library = import_oracle("vit_pytorch.distill", pytestconfig)
    student = vit_pytorch_student(library, T2T)
    with pytest.raises(Exception, match="Wrong shape: expected 2 dims"):
        student(torch.zeros(1, 3, 11, 11))


# What no original is needed for


@pytest.mark.parametrize("name", ["distill_pytorch", "distill_deit"])
def test_no_gradient_goes_into_the_teachers_logits(backend: Subject, name: str) -> None:
    case = TRAINERS[name]
    model, others = backend.build(case), case.others
    images, targets, given = (
        backend.tensor(array)
        for array in (case.images, others["targets"], others["teacher_logits"])
    )
    by_targets, by_teacher = differentiated(backend, model, images, targets, given)
    assert by_targets is not None  # it goes into the targets
    assert np.abs(by_targets).min() > 0
    assert by_teacher is None or not by_teacher.any()


def differentiated(backend: Subject, model: Any, images: Any, *given: Any) -> list[Any]:
    """Gradients of the loss of a batch by targets and teacher's logits; None where none goes."""
    if backend.name in ("torch", "keras:torch"):
        leaves = [tensor.requires_grad_() for tensor in given]
        found = torch.autograd.grad(model(images, *leaves).sum(), leaves, allow_unused=True)
        return [None if gradient is None else gradient.numpy() for gradient in found]
    if backend.name == "keras:tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(given)
            loss = tf.reduce_sum(model(images, *given))
        found = tape.gradient(loss, given)
        return [None if gradient is None else gradient.numpy() for gradient in found]
    import jax

    found = jax.grad(lambda *given: model(images, *given).sum(), argnums=(0, 1))(*given)
    return [np.asarray(gradient) for gradient in found]


def test_of_equal_logits_of_the_teacher_the_first_counts(backend: Subject) -> None:
    case = TRAINERS["distill_deit"]
    model, targets = backend.build(case), case.others["targets"]

    def losses(row: list[float]) -> np.ndarray:
        teacher_logits = np.float32([row] * case.batch)
        others = {"targets": targets, "teacher_logits": teacher_logits}
        return backend.runtime.forward(model, case.images, others)

    np.testing.assert_array_equal(losses([0, 2, 2, 1, 2]), losses([0, 2, 1, 1, 0]))
    assert (losses([0, 2, 2, 1, 2]) != losses([0, 1, 2, 1, 0])).all()


def test_a_teacher_of_another_framework(backend: Subject) -> None:
    """A model in torch that this backend's student learns from; its logits pass as an array."""
    case = TRAINERS["distill_t2t"]
    sizes = {**SMALL, "image_size": case.config.student.image_size, "patch_size": (5, 6)}
    teacher = isovit.build(ViTConfig(**sizes), "torch", dtype="float64")
    with torch.inference_mode():
        teacher_logits = teacher(torch.tensor(case.images).double()).numpy()
    others = {"targets": case.others["targets"], "teacher_logits": teacher_logits}
    found = backend.runtime.forward(backend.build(case), case.images, others)
    from parity_tests.oracles.arrays import reference

    wanted = reference(case.config, case.weights, case.images, others)
    assert_outputs_agree(found, wanted[""])


def test_labels_are_targets_with_a_single_one(backend: Subject) -> None:
    """With the teacher's own labels and a hard teacher both halves are plain cross-entropies."""
    case = TRAINERS["distill_deit"]
    labels = case.others["teacher_logits"].argmax(axis=1)
    others = {**case.others, "targets": np.eye(5, dtype=np.float32)[labels]}
    model = backend.build(case)
    heads = [backend.array(x) for x in model.forward_heads(backend.tensor(case.images))]
    picked = [x[range(case.batch), labels] - np.log(np.exp(x).sum(axis=1)) for x in heads]
    found = backend.runtime.forward(model, case.images, others)
    assert_outputs_agree(found, -(picked[0] + picked[1]) / 2)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(student=VIT.replace(num_classes=1)), r"student\.num_classes=1: a loss of classes needs"),
    (dict(student=VIT.replace(num_classes=0)), r"student\.num_classes=0"),
    (dict(student=isovit.config("cait_xxs24")), r"student\.family='cait': must be one of vit, t2t"),
    (dict(student=DEIT), "token='appended': the student has one"),
    (dict(student=VIT, token="own"), r"token='own': needs student\.dist_head=true"),
    (dict(student=T2T, token="own"), r"token='own': needs student\.dist_head=true"),
    (dict(student=DEIT, token="own", dist_norm=True), "dist_norm=True: stands before the head"),
    (dict(student=VIT, alpha=0.0), "alpha=0.0"),  # a head that would never learn
    (dict(student=VIT, alpha=1.0), "alpha=1.0"),
    (dict(student=VIT, temperature=0.0), "temperature=0.0"),
]


@pytest.mark.parametrize(("fields", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_what_cannot_be_is_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        DistillConfig(**fields)


def test_the_variants_are_deits_and_vit_pytorchs() -> None:
    for size in ("ti", "s", "b"):
        config = isovit.config(f"distill_deit_{size}16")
        student = isovit.config(f"deit_{size}16_distilled")
        assert param_tree(config).count() == param_tree(student).count()
        assert (config.hard, config.alpha, config.temperature) == (True, 0.5, 1.0)
    config = isovit.config("distill_vit_pytorch")
    extra = 1024 + 1024 * 1000 + 1000  # token, head
    assert param_tree(config).count() == param_tree(config.student).count() + extra
    assert probe(config)["student.pos_embed"].shape == (1, 65, 1024)  # none for the token


def test_vit_pytorchs_readme_has_as_many_parameters(pytestconfig: pytest.Config) -> None:
    library = import_oracle("vit_pytorch.distill", pytestconfig)
    with torch.device("meta"):
        student = library.DistillableViT(
            image_size=256, patch_size=32, num_classes=1000, dim=1024, depth=6, heads=8,
            mlp_dim=2048, dropout=0.1, emb_dropout=0.1,
        )  # fmt: skip
        wrapper = library.DistillWrapper(teacher=None, student=student, temperature=3)
    wanted = sum(parameter.numel() for parameter in wrapper.parameters())
    assert param_tree(isovit.config("distill_vit_pytorch")).count() == wanted
