"""Faults of ports of DINO."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isovit.backends.torch.objectives import dino
from isovit.spec.families.vit import ViTConfig
from isovit.spec.objectives.dino import DINOConfig
from isovit.spec.resample import centres, keys, torch_bicubic
from isovit.weight_convert.resize import torch_bicubic_antialias
from parity_tests.controls.blocks import gelu_tanh
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

NET = ViTConfig(
    image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=1, num_heads=3, mlp_dim=30,
    num_classes=0,
)  # fmt: skip
DINO = DINOConfig(
    net=NET, views=3, head_hidden_dim=14, bottleneck_dim=10, out_dim=10, last_gain_trains=True,
    student_temp=0.5, teacher_temp=0.2,
)  # fmt: skip

CASES: dict[str, Any] = {
    "dino": DINO,
    "dino_pytorch": DINO.replace(
        views=2, head_last_activation=True, normalize_eps=1e-6, last_layer="dense",
        last_gain_trains=False,
    ),
    "dino_local": DINO.replace(
        net=NET.replace(image_size=(12, 16)).to_dict(), views=2, local_views=2,
        local_image_size=(8, 12),
    ),
}  # fmt: skip

LAST = "student.head.last_layer"
FIRST = "student.net.blocks.0.norm1"
"""Behind the positions, which no module adds."""

Probs = Callable[[Model, Tensor], Tensor]
Pairs = Callable[[DINOConfig], tuple[tuple[int, int], ...]]


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def of_teacher(model: Model, x: Tensor) -> Tensor:
    """The sound probabilities: the centre subtracted, then the temperature."""
    return torch.softmax((x - model.center) / model.config.teacher_temp, dim=-1)


def of_student(model: Model, x: Tensor) -> Tensor:
    """The sound logarithms of probabilities."""
    return torch.log_softmax(x / model.config.student_temp, dim=-1)


def others(config: DINOConfig) -> tuple[tuple[int, int], ...]:
    """The sound pairs."""
    return config.pairs


def rewrite_losses(
    model: Model,
    *,
    teacher: Probs = of_teacher,
    student: Probs = of_student,
    pairs: Pairs = others,
    entropy: Callable[[Tensor, Tensor], Tensor] = lambda p, q: -(p * q).sum(dim=-1),
) -> None:
    """Give DINO a loss with one part exchanged."""

    def losses(model: Any, said: Tensor, wanted: Tensor, _: float | None = None) -> Tensor:
        probs, log_probs = teacher(model, wanted), student(model, said)
        found = [entropy(probs[:, t], log_probs[:, s]) for t, s in pairs(model.config)]
        return torch.stack(found).mean(dim=0)

    model.losses = MethodType(losses, model)


def rewrite_last(model: Model, kernel: Callable[[Any], Tensor]) -> None:
    """Give the last products another matrix, (dim_out, dim)."""

    def forward(last: Any, x: Tensor) -> Tensor:
        return x @ kernel(last).T

    rewrite(modules(model, dino.WeightNormLinear), forward)


def lengths(last: Any, dim: int = 1) -> Tensor:
    """The sound lengths of the directions."""
    return last.weight.square().sum(dim=dim, keepdim=True).sqrt()


def rewrite_resize(model: Model, resize: Callable[[Any, Tensor], Tensor]) -> None:
    """Give the patches' positions, (1, rows, columns, dim), another way to a grid."""

    def forward(module: Any, table: Tensor) -> Tensor:
        prefix, x = table[:, : module.prefix], table[:, module.prefix :]
        return torch.cat([prefix, resize(module, x.unflatten(1, module.grid)).flatten(1, 2)], 1)

    rewrite(modules(model, dino.ResizePositions), forward)


def set_matrices(model: Model, matrix: Callable[[int, int], np.ndarray]) -> None:
    """Give the resize of positions the matrices of another method."""
    for module in modules(model, dino.ResizePositions):
        matrices = map(matrix, module.grid, model.config.local_net.grid)
        module.rows, module.columns = map(torch.from_numpy, matrices)


# --- faults: loss ---------------------------------------------------------------------------------


def temperatures_swapped(model: Model, _: Patch) -> None:
    """Arguments (student, teacher) where the function has (teacher, student); vit-pytorch's has."""

    def teacher(model: Model, x: Tensor) -> Tensor:
        return torch.softmax((x - model.center) / model.config.student_temp, dim=-1)

    def student(model: Model, x: Tensor) -> Tensor:
        return torch.log_softmax(x / model.config.teacher_temp, dim=-1)

    rewrite_losses(model, teacher=teacher, student=student)


def center_behind_temperature(model: Model, _: Patch) -> None:
    """softmax(t / τ - c) for softmax((t - c) / τ): a centre that weighs too little."""
    rewrite_losses(
        model,
        teacher=lambda model, x: torch.softmax(
            x / model.config.teacher_temp - model.center, dim=-1
        ),
    )


def center_added(model: Model, _: Patch) -> None:
    """The sign of the centre: the teacher soon says the same of all images."""
    rewrite_losses(model, teacher=lambda model, x: of_teacher(model, x + 2 * model.center))


def center_of_before(model: Model, _: Patch) -> None:
    """The centre moved before the loss in place of behind it."""

    def teacher(model: Model, x: Tensor) -> Tensor:
        center = 0.9 * model.center + 0.1 * x.mean(dim=(0, 1))[None]
        return torch.softmax((x - center) / model.config.teacher_temp, dim=-1)

    rewrite_losses(model, teacher=teacher)


def center_of_the_student(model: Model, _: Patch) -> None:
    """Both centred alike; only the teacher is."""
    rewrite_losses(model, student=lambda model, x: of_student(model, x - model.center))


def student_teaches(model: Model, _: Patch) -> None:
    """The cross-entropy the other way round: the student's probabilities are the target."""

    def entropy(probs: Tensor, log_probs: Tensor) -> Tensor:
        return -(log_probs.exp() * probs.log()).sum(dim=-1)

    rewrite_losses(model, entropy=entropy)


def same_view_compared(model: Model, _: Patch) -> None:
    """Every pair, those of one crop with itself among them."""
    rewrite_losses(
        model,
        pairs=lambda config: tuple(
            (t, s) for t in range(config.teacher_views) for s in range(config.views)
        ),
    )


def views_not_crossed(model: Model, _: Patch) -> None:
    """Each of the teacher's views with the student's of the same number."""
    rewrite_losses(model, pairs=lambda config: tuple((t, t) for t in range(config.teacher_views)))


def further_views_dropped(model: Model, _: Patch) -> None:
    """The pairs of vit-pytorch, which has two views, for any number of them."""
    rewrite_losses(model, pairs=lambda _: ((0, 1), (1, 0)))


def mean_over_outputs(model: Model, _: Patch) -> None:
    """The mean of the products for their sum: out_dim times too small."""
    rewrite_losses(model, entropy=lambda probs, log_probs: -(probs * log_probs).mean(dim=-1))


# --- faults: head and teacher ---------------------------------------------------------------------


def length_left(_: Model, patch: Patch) -> None:
    """No vector of length 1 before the last product."""
    patch.setattr(dino, "normalize", lambda x, _: x)


def length_of_the_batch(_: Model, patch: Patch) -> None:
    """Lengths along the first axis: of one number over all images."""
    patch.setattr(dino, "normalize", lambda x, eps: F.normalize(x, dim=0, eps=eps))


def epsilon_added(_: Model, patch: Patch) -> None:
    """x / (‖x‖ + ε), as JAX's users write it, for x / max(‖x‖, ε)."""
    patch.setattr(dino, "normalize", lambda x, _: x / (x.norm(dim=-1, keepdim=True) + 1e-6))


def last_activation_missing(model: Model, _: Patch) -> None:
    """The official head, with none behind its last product, for vit-pytorch's."""
    for head in modules(model, dino.Head):
        head.config = model.config.replace(head_last_activation=False)


def last_activation_added(model: Model, _: Patch) -> None:
    """vit-pytorch's head for the official one."""
    for head in modules(model, dino.Head):
        head.config = model.config.replace(head_last_activation=True)


def gain_ignored(model: Model, _: Patch) -> None:
    """``weight_v`` read, ``weight_g`` left out: right while each is 1."""
    rewrite_last(model, lambda last: last.weight / lengths(last))


def directions_taken_for_weights(model: Model, _: Patch) -> None:
    """A plain product with ``weight_v``."""
    rewrite_last(model, lambda last: last.weight)


def lengths_along_the_outputs(model: Model, _: Patch) -> None:
    """``weight_norm`` over the other axis: torch's counts rows, and Flax's columns."""
    rewrite_last(model, lambda last: last.gain[:, None] * last.weight / lengths(last, dim=0))


def teacher_is_the_student(model: Model, _: Patch) -> None:
    """One model for both: what a teacher is that shares its parameters in place of a copy."""
    model.teacher.load_state_dict(model.student.state_dict())


# --- faults: local views --------------------------------------------------------------------------


def enlargement_left_out(model: Model, _: Patch) -> None:
    """A size given to ``interpolate`` in place of a factor that is a tenth of a patch too large."""
    set_matrices(model, torch_bicubic)


def antialiased(model: Model, _: Patch) -> None:
    """``antialias=True``, with its other cubic kernel, as timm has it."""
    set_matrices(model, torch_bicubic_antialias)


def kernel_of_keys(model: Model, _: Patch) -> None:
    """The cubic kernel of TensorFlow and JAX, a = -0.5, at the right places."""

    def matrix(size_in: int, size_out: int) -> np.ndarray:
        at = centres(size_out, size_in / (size_out + 0.1))[:, None]
        weights = keys(at - np.arange(-2, size_in + 2), a=-0.5)
        border = np.clip(np.arange(-2, size_in + 2), 0, size_in - 1)[:, None] == np.arange(size_in)
        return weights @ border.astype(np.float64)

    set_matrices(model, matrix)


def table_cropped(model: Model, _: Patch) -> None:
    """The positions of the first rows and columns."""

    def corner(module: Any, x: Tensor) -> Tensor:
        return x[:, : len(module.rows), : len(module.columns)]

    rewrite_resize(model, corner)


def first_positions(model: Model, _: Patch) -> None:
    """As many positions as there are patches, from the first on; vit-pytorch's way."""

    def first(module: Any, x: Tensor) -> Tensor:
        rows, columns = len(module.rows), len(module.columns)
        return x.flatten(1, 2)[:, : rows * columns].unflatten(1, (rows, columns))

    rewrite_resize(model, first)


def grid_transposed(model: Model, _: Patch) -> None:
    """Width before height: right where a grid is square."""

    def transposed(module: Any, x: Tensor) -> Tensor:
        x = x.flatten(1, 2).unflatten(1, module.grid[::-1]).transpose(1, 2)
        return torch.einsum("ri,cj,bijd->brcd", module.rows, module.columns, x)

    rewrite_resize(model, transposed)


def class_position_lost(model: Model, _: Patch) -> None:
    """No position for the class token of a local view."""

    def forward(module: Any, table: Tensor) -> Tensor:
        resized = type(module).forward(module, table)
        return torch.cat([torch.zeros_like(table[:, :1]), resized[:, 1:]], dim=1)

    rewrite(modules(model, dino.ResizePositions), forward)


def local_views_compared_once(model: Model, _: Patch) -> None:
    """Local views with the first of the teacher's alone."""
    rewrite_losses(
        model,
        pairs=lambda config: tuple((t, s) for t, s in config.pairs if s < config.views or t == 0),
    )


def local_views_numbered_anew(model: Model, _: Patch) -> None:
    """From 0 on, so that some seem to be the teacher's."""
    rewrite_losses(
        model, pairs=lambda config: tuple((t, s) for t, s in config.pairs if s - config.views != t)
    )


def local_views_left_out(model: Model, _: Patch) -> None:
    """Seen, and compared with nothing."""
    rewrite_losses(
        model, pairs=lambda config: tuple((t, s) for t, s in config.pairs if s < config.views)
    )


# --- harmless rewrites ----------------------------------------------------------------------------


def loss_of_torch(model: Model, _: Patch) -> None:
    """The scaffold of the faults, with torch's own cross-entropy of probabilities."""
    rewrite_losses(
        model,
        student=lambda model, x: x / model.config.student_temp,
        entropy=lambda probs, x: F.cross_entropy(x, probs, reduction="none"),
    )


def logarithm_of_softmax(model: Model, _: Patch) -> None:
    """log(softmax + 1e-20), as vit-pytorch had it before release 1.26."""
    rewrite_losses(
        model,
        student=lambda model, x: torch.log(
            torch.softmax(x / model.config.student_temp, dim=-1) + 1e-20
        ),
    )


def lengths_of_torch(model: Model, patch: Patch) -> None:
    """torch's own ``normalize``, and its own ``weight_norm``."""
    patch.setattr(dino, "normalize", lambda x, eps: F.normalize(x, dim=-1, eps=eps))
    rewrite_last(model, lambda last: torch._weight_norm(last.weight, last.gain[:, None], 0))


def resize_of_torch(model: Model, _: Patch) -> None:
    """torch's own bicubic, told the factor as the official model tells it."""

    def resize(module: Any, x: Tensor) -> Tensor:
        sizes = zip((len(module.rows), len(module.columns)), module.grid, strict=True)
        factors = tuple((new + 0.1) / old for new, old in sizes)
        x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=factors, mode="bicubic")
        return x.permute(0, 2, 3, 1)

    rewrite_resize(model, resize)


# --- faults that only a gradient shows ------------------------------------------------------------


def length_detached(_: Model, patch: Patch) -> None:
    """The length taken for a constant."""

    def normalize(x: Tensor, eps: float) -> Tensor:
        return x / x.detach().norm(dim=-1, keepdim=True).clamp(min=eps)

    patch.setattr(dino, "normalize", normalize)


def lengths_detached(model: Model, _: Patch) -> None:
    """Directions of length 1 by a constant: the gradient is not across them any more."""

    def kernel(last: Any) -> Tensor:
        return last.gain[:, None] * last.weight / lengths(last).detach()

    rewrite_last(model, kernel)


def first_view_detached(model: Model, _: Patch) -> None:
    """No gradient from the view that the teacher sees as well, for which it is the same crop."""

    def student(model: Model, x: Tensor) -> Tensor:
        return of_student(model, torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1))

    rewrite_losses(model, student=student)


def positions_detached(model: Model, _: Patch) -> None:
    """No gradient from local views to the positions: what a table made without one gives."""

    def forward(module: Any, table: Tensor) -> Tensor:
        return type(module).forward(module, table.detach())

    rewrite(modules(model, dino.ResizePositions), forward)


def local_views_detached(model: Model, _: Patch) -> None:
    """No gradient from local views at all."""

    def student(model: Model, x: Tensor) -> Tensor:
        views = model.config.views
        return of_student(model, torch.cat([x[:, :views], x[:, views:].detach()], dim=1))

    rewrite_losses(model, student=student)


# --- tables ---------------------------------------------------------------------------------------


FAULTS = (
    Fault(gelu_tanh, "dino", "student.net.blocks.0.mlp.fc2"),
    Fault(temperatures_swapped, "dino"),
    Fault(center_behind_temperature, "dino"),
    Fault(center_added, "dino"),
    Fault(center_of_before, "dino"),
    Fault(center_of_the_student, "dino"),
    Fault(student_teaches, "dino"),
    Fault(same_view_compared, "dino"),
    Fault(views_not_crossed, "dino_pytorch"),
    Fault(further_views_dropped, "dino"),
    Fault(mean_over_outputs, "dino"),
    Fault(length_left, "dino", LAST),
    Fault(length_of_the_batch, "dino", LAST),
    Fault(epsilon_added, "dino", LAST),
    Fault(last_activation_missing, "dino_pytorch", LAST),
    Fault(last_activation_added, "dino", LAST),
    Fault(gain_ignored, "dino", LAST),
    Fault(directions_taken_for_weights, "dino", LAST),
    Fault(lengths_along_the_outputs, "dino", LAST),
    Fault(teacher_is_the_student, "dino", "teacher.net.patch_embed.proj"),
    Fault(gelu_tanh, "dino_local", "student.net.blocks.0.mlp.fc2"),
    Fault(enlargement_left_out, "dino_local", FIRST),
    Fault(antialiased, "dino_local", FIRST),
    Fault(kernel_of_keys, "dino_local", FIRST),
    Fault(table_cropped, "dino_local", FIRST),
    Fault(first_positions, "dino_local", FIRST),
    Fault(grid_transposed, "dino_local", FIRST),
    Fault(class_position_lost, "dino_local", FIRST),
    Fault(local_views_compared_once, "dino_local"),
    Fault(local_views_numbered_anew, "dino_local"),
    Fault(local_views_left_out, "dino_local"),
)


HARMLESS = (
    Fault(loss_of_torch, "dino"),
    Fault(logarithm_of_softmax, "dino_pytorch"),
    Fault(lengths_of_torch, "dino"),
    Fault(loss_of_torch, "dino_local"),
    Fault(resize_of_torch, "dino_local"),
)


GRADIENT_FAULTS = (
    GradientFault(length_detached, "dino", "student.head.mlp.2.kernel", f"{LAST}.kernel"),
    GradientFault(lengths_detached, "dino", f"{LAST}.kernel", "student.head.mlp.2.kernel"),
    GradientFault(first_view_detached, "dino", "student.net.pos_embed", None),
    GradientFault(
        positions_detached, "dino_local", "student.net.pos_embed", "student.net.cls_token"
    ),
    GradientFault(local_views_detached, "dino_local", "student.net.pos_embed", None),
)
