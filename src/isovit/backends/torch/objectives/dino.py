"""DINO in PyTorch.

Source: Caron et al. 2021, arXiv:2104.14294, section 3.1 and algorithm 1; see the spec for its
forms.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends import model_class
from isovit.backends.torch.layers import ACTIVATIONS, Linear, resample
from isovit.spec.config import Config
from isovit.spec.objectives.dino import DINOConfig
from isovit.spec.resample import dino_bicubic


def normalize(x: Float[Tensor, "batch dim"], eps: float) -> Float[Tensor, "batch dim"]:
    """Vectors of length 1, but where they are shorter than ``eps``."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)


def fix(module: nn.Module) -> None:
    """Make parameters that nothing trains of all of a module's."""
    for parameter in module.parameters():
        parameter.requires_grad = False


class WeightNormLinear(Linear):
    """x·Wᵀ, rows of W in directions and of lengths of their own; arXiv:1602.07868, eq. 2."""

    def __init__(self, dim: int, dim_out: int, gain_trains: bool) -> None:
        super().__init__(dim, dim_out, bias=False)
        self.gain = nn.Parameter(torch.ones(dim_out), requires_grad=gain_trains)

    def forward(self, input: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim_out"]:
        length = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True)
        return input @ (self.gain[:, None] * self.weight / length).T


class Head(nn.Module):
    """Products with activations, a vector of length 1, and a last product."""

    def __init__(self, config: DINOConfig) -> None:
        super().__init__()
        self.config, dims = config, config.head_dims
        self.mlp = nn.ModuleList(
            Linear(dims[i], dims[i + 1], bias=True) for i in range(config.head_layers)
        )
        self.activation = ACTIVATIONS[config.activation]
        self.last_layer = (
            WeightNormLinear(dims[-1], config.out_dim, config.last_gain_trains)
            if config.last_layer == "weight_norm"
            else Linear(dims[-1], config.out_dim, bias=True)
        )

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out_dim"]:
        for i, product in enumerate(self.mlp):
            x = product(x)
            if i + 1 < self.config.head_layers or self.config.head_last_activation:
                x = self.activation(x)
        return self.last_layer(normalize(x, self.config.normalize_eps))


class ResizePositions(nn.Module):
    """Positions of the patches of local views, R X Cᵀ of the net's; the others stay as they are."""

    def __init__(self, config: DINOConfig) -> None:
        super().__init__()
        self.grid, self.prefix, _ = config.net.position_tables["pos_embed"]
        matrices = map(dino_bicubic, self.grid, config.local_net.grid)
        # No buffers: those are rounded for good when the model is cast.
        self.rows, self.columns = map(torch.from_numpy, matrices)

    def forward(self, table: Float[Tensor, "1 positions dim"]) -> Float[Tensor, "1 local dim"]:
        prefix, x = table[:, : self.prefix], table[:, self.prefix :]
        x = x.unflatten(1, self.grid)  # (1, rows, columns, dim)
        x = resample(x, self.rows, self.columns)
        return torch.cat([prefix, x.flatten(1, 2)], dim=1)


class Network(nn.Module):
    """A model and its head: the student, or the teacher."""

    def __init__(self, config: DINOConfig, net: Config) -> None:
        super().__init__()
        self.net = model_class("torch", net.family)(net)
        self.head = Head(config)

    def forward(
        self,
        images: Float[Tensor, "batch height width channels"],
        pos_embed: Float[Tensor, "1 positions dim"] | None = None,
    ) -> Float[Tensor, "batch out_dim"]:
        if pos_embed is None:
            return self.head(self.net(images))
        x = self.net.positioned(self.net.patch_embed(images), pos_embed)
        return self.head(self.net.classify(self.net.encode(x)))


class DINO(nn.Module):
    """Student and teacher: the loss of what the one says of a view and the other of another.

    Called with the student's views, (batch, views, height, width, channels), the teacher's and, if
    the config has some, the student's local ones; returns (batch,) cross-entropies. After it,
    ``update_center``; after the optimiser's step, ``update_teacher``.
    """

    def __init__(self, config: DINOConfig) -> None:
        super().__init__()
        self.config = config
        self.center = nn.Parameter(torch.zeros(1, config.out_dim), requires_grad=False)
        self.student = Network(config, config.net)
        self.teacher = Network(config, config.teacher_net)
        fix(self.teacher)
        self.resize = ResizePositions(config) if config.resizes else nn.Identity()

    def project_student(
        self,
        images: Float[Tensor, "batch views height width channels"],
        local_images: Float[Tensor, "batch local_views rows columns channels"] | None = None,
    ) -> Float[Tensor, "batch all_views out_dim"]:
        """What the student says of each view, the local ones last."""
        self.config.check_images(images.shape)
        self.config.check_local_images(None if local_images is None else local_images.shape)
        outputs = [self.student(view) for view in images.unbind(1)]
        if local_images is not None:
            pos_embed = self.resize(self.student.net.pos_embed)
            outputs += [self.student(view, pos_embed) for view in local_images.unbind(1)]
        return torch.stack(outputs, dim=1)

    def project_teacher(
        self, images: Float[Tensor, "batch views height width channels"]
    ) -> Float[Tensor, "batch views out_dim"]:
        """What the teacher says of each view; no gradient goes through it."""
        self.config.check_teacher_images(images.shape)
        with torch.no_grad():
            return torch.stack([self.teacher(view) for view in images.unbind(1)], dim=1)

    def losses(
        self,
        student: Float[Tensor, "batch all_views out_dim"],
        teacher: Float[Tensor, "batch teacher_views out_dim"],
        teacher_temp: float | None = None,
    ) -> Float[Tensor, " batch"]:
        """Of each image, the mean cross-entropy of the pairs of views."""
        temp = self.config.teacher_temp if teacher_temp is None else teacher_temp
        probs = torch.softmax((teacher.detach() - self.center) / temp, dim=-1)
        log_probs = torch.log_softmax(student / self.config.student_temp, dim=-1)
        pairs = [-(probs[:, t] * log_probs[:, s]).sum(dim=-1) for t, s in self.config.pairs]
        return torch.stack(pairs, dim=1).mean(dim=1)

    def forward(
        self,
        images: Float[Tensor, "batch views height width channels"],
        teacher_images: Float[Tensor, "batch teacher_views height width channels"],
        local_images: Float[Tensor, "batch local_views rows columns channels"] | None = None,
        teacher_temp: float | None = None,
    ) -> Float[Tensor, " batch"]:
        student = self.project_student(images, local_images)
        teacher = self.project_teacher(teacher_images)
        return self.losses(student, teacher, teacher_temp)


@torch.no_grad()
def update_teacher(model: DINO, decay: float) -> None:
    """Move the teacher towards its student: t ← decay·t + (1 − decay)·s, for all that trains."""
    pairs = zip(model.student.parameters(), model.teacher.parameters(), strict=True)
    for student, teacher in pairs:
        if student.requires_grad:
            teacher.copy_(decay * teacher + (1 - decay) * student)


@torch.no_grad()
def update_center(
    model: DINO, teacher: Float[Tensor, "batch teacher_views out_dim"], momentum: float
) -> None:
    """Move the centre towards the mean of what the teacher said: c ← momentum·c + (1 − m)·mean."""
    mean = teacher.mean(dim=(0, 1))[None]  # (1, out_dim)
    model.center.copy_(momentum * model.center + (1 - momentum) * mean)
