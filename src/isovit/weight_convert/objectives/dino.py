"""Rename tables of DINO: student, teacher and centre, as a training keeps them.

Sources: facebookresearch/dino (Apache-2.0), whose files are read whole where the caller says that
all is wanted (``--model dino_vit_s16``); without that they are read as a ViT, the teacher's.
vit-pytorch's ``dino.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from isovit.spec.objectives.dino import DINOConfig
from isovit.weight_convert.formats import rename_table
from isovit.weight_convert.rename import RenameTable, drop, parameter, rename, within

TOGETHER = ("student", "teacher", "dino_loss")
"""The state dicts of a file that are one model."""


def dino(config: DINOConfig) -> RenameTable:
    """The official code: timm's names behind ``backbone.``, and the head's."""
    net, last = rename_table("dino", config.net), "head.last_layer"
    return RenameTable(
        *(
            row
            for side in ("student", "teacher")
            for row in (
                *within(f"{side}.backbone", f"{side}.net", (*net.rows, *net.drops)),
                rename(f"{side}.head.mlp.{{2i}}", f"{side}.head.mlp.{{i}}"),
                parameter(f"{side}.{last}.weight_g", f"{side}.{last}.gain", "o 1"),
                parameter(f"{side}.{last}.weight_v", f"{side}.{last}.kernel", "o i"),
            )
        ),
        rename("dino_loss.center", "center"),
    )


def vit_pytorch(config: DINOConfig) -> RenameTable:
    """vit-pytorch's Dino, whose model has its own head, and is there twice."""
    net, last = rename_table("vit_pytorch", config.net), 2 * config.head_layers + 1
    return RenameTable(
        *(
            row
            for side in ("student", "teacher")
            for row in (
                *within(f"{side}_encoder.net", f"{side}.net", (*net.rows, *net.drops)),
                rename(f"{side}_encoder.projector.net.{{2i}}", f"{side}.head.mlp.{{i}}"),
                rename(f"{side}_encoder.projector.net.{last}", f"{side}.head.last_layer"),
            )
        ),
        rename("teacher_centers", "center"),
        drop(r"net\..*", "the student's model under another name"),
        drop(r"(student|teacher)_encoder\.net\.mlp_head\..*", "head that DINO does not ask"),
        drop("last_teacher_centers", "what the centre has yet to move towards"),
    )


def read_only(_: DINOConfig) -> Iterator[str]:
    """Files of a training are read, so that it can go on here; none are written."""
    yield "two models and a centre, which are read and not written"


TABLES: dict[str, Callable[[DINOConfig], RenameTable]] = {"dino": dino, "vit_pytorch": vit_pytorch}
MISFITS: dict[str, Callable[[DINOConfig], Iterator[str]]] = dict.fromkeys(TABLES, read_only)
