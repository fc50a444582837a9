"""The official DINO's head, loss and crops, once more in torch, as its paper and names tell them.

No package has them. The backbone is timm's, whose names are the official ones; crops of another
size than its own go through its parts, with its positions resized by torch itself.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.spec.objectives.dino import DINOConfig


def head(config: DINOConfig) -> nn.Sequential:
    """The head, under the names of the official state dict: ``mlp.{0,2,4}``, ``last_layer``."""
    layers: list[nn.Module] = []
    for dim, dim_out in itertools.pairwise(config.head_dims):
        layers += [nn.GELU(), nn.Linear(dim, dim_out)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the names weight_g, weight_v
        last = nn.utils.weight_norm(nn.Linear(config.bottleneck_dim, config.out_dim, bias=False))
    parts = {"mlp": nn.Sequential(*layers[1:]), "unit": Unit(), "last_layer": last}
    made = nn.Sequential()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


class Unit(nn.Module):
    """Vectors of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.normalize(x, dim=-1, p=2)


def positions(backbone: Any, rows: int, columns: int) -> Tensor:
    """The positions on another grid, from torch's own bicubic by a factor, 0.1 added to sizes."""
    grid, table = backbone.patch_embed.grid_size, backbone.pos_embed
    patches = table[:, 1:].transpose(1, 2).unflatten(2, grid)  # (1, dim, rows, columns)
    factors = ((rows + 0.1) / grid[0], (columns + 0.1) / grid[1])
    resized = F.interpolate(patches, scale_factor=factors, mode="bicubic")
    assert resized.shape[2:] == (rows, columns)
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def features(backbone: Any, crops: Tensor) -> Tensor:
    """The class token of crops of any size; by the backbone itself where that is its own."""
    if crops.shape[2:] == backbone.patch_embed.img_size:
        return backbone(crops)
    x = backbone.patch_embed.proj(crops)  # (batch, dim, rows, columns)
    table = positions(backbone, *x.shape[2:])
    tokens = [backbone.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)]
    return backbone.norm(backbone.blocks(torch.cat(tokens, dim=1) + table))[:, 0]


class Network(nn.Module):
    """Backbone and head; crops of one size are a batch to the one, all of them to the other."""

    def __init__(self, backbone: nn.Module, config: DINOConfig) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head(config)

    def forward(self, crops: list[Tensor]) -> Tensor:
        """(crops · batch, out_dim), crop by crop."""
        sizes = itertools.groupby(crops, lambda crop: crop.shape[2:])
        found = [features(self.backbone, torch.cat(list(group))) for _, group in sizes]
        return self.head(torch.cat(found))


class Training:
    """The official loop, but for its optimiser: what it keeps, and one loss at a time."""

    def __init__(self, backbones: tuple[nn.Module, nn.Module], config: DINOConfig) -> None:
        self.student, self.teacher = (Network(net, config).double() for net in backbones)
        self.center = torch.zeros(1, config.out_dim, dtype=torch.float64)
        self.config = config

    def loss(self, crops: list[Tensor], shown: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what the teacher said; the centre stays."""
        config = self.config
        said = (self.student(crops) / config.student_temp).chunk(len(crops))
        with torch.no_grad():
            outputs = self.teacher(shown)
            wanted = F.softmax((outputs - self.center) / config.teacher_temp, dim=-1)
        terms = [
            torch.sum(-q * F.log_softmax(v, dim=-1), dim=-1).mean()
            for i, q in enumerate(wanted.chunk(config.teacher_views))
            for j, v in enumerate(said)
            if i != j
        ]
        return torch.stack(terms).mean(), outputs

    @torch.no_grad()
    def move(self, outputs: Tensor, momentum: float, decay: float) -> None:
        """The centre by what the teacher said, then the teacher by its student."""
        self.center = self.center * momentum + outputs.mean(dim=0, keepdim=True) * (1 - momentum)
        for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            k.data.mul_(decay).add_((1 - decay) * q.detach().data)

    def checkpoint(self, **others: Any) -> dict[str, Any]:
        """What is saved: the student behind ``module.``, as it trains on several devices."""
        student = {f"module.{name}": x for name, x in self.student.state_dict().items()}
        kept = {"student": student, "teacher": self.teacher.state_dict()}
        return {**kept, "dino_loss": {"center": self.center}, "epoch": 3, **others}
