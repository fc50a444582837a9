"""SimMIM: a ViT learns by painting the patches of an image that a mask token stands for.

Source: Xie et al. 2022, "SimMIM: a Simple Framework for Masked Image Modeling", arXiv:2111.09886,
section 3; the official code (microsoft/SimMIM, MIT) for what the paper leaves open; vit-pytorch's
``simmim.py`` (MIT) for its form.

Unlike in MAE the encoder sees every patch, of which some are one shared mask token before they get
their positions; one dense layer paints them, and the mean of |painted - pixels| over those is the
loss. Both forms are one config. The official one hides squares of 32 pixels, whatever the patch is,
and rounds their number up; vit-pytorch's hides single patches, rounds down, and divides the mean by
the number of hidden patches once more.

The encoder is the ViT of this project: the official runs add relative positions to the attention in
the place of its table, as BEiT does. The official code adds 1e-5 to the number of hidden pixels of
the batch, so that a batch without any has a loss; here there is always one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from isovit.spec.config import BaseConfig, Pair, Rate, require
from isovit.spec.families import vit
from isovit.spec.families.vit import SIZES, VIT_PYTORCH, ViTConfig
from isovit.spec.objectives.mae import check_encoder, draw_order
from isovit.spec.param import Param, ParamTree, Role, dense
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class SimMIMConfig(BaseConfig, frozen=True, kw_only=True, tag="simmim"):
    """Config of SimMIM.

    Called with (batch, height, width, channels) images and ``order``, (batch, units) integers: a
    permutation of the units of each image, row by row, of which the first ``hidden_units`` are
    hidden.

    Attributes:
        encoder: the ViT that learns: without a head. Its class token, if it has one, goes through
            the blocks and is not painted (vit-pytorch leaves it out: there the encoder has none).
        mask_ratio: fraction of the units that is hidden.
        mask_rounds: whether its product with their number rounds ``up`` (official) or ``down``
            (vit-pytorch).
        mask_unit: rows and columns of patches that are hidden together.
        divided_by_hidden: whether the mean over the hidden patches is divided by their number once
            more (vit-pytorch).
    """

    encoder: ViTConfig = ViTConfig(num_classes=0)
    mask_ratio: Rate = 0.6
    mask_rounds: Literal["up", "down"] = "up"
    mask_unit: Pair = (2, 2)
    divided_by_hidden: bool = False

    def check(self) -> None:
        """Check that the encoder can be one, and that units tile it and some are hidden."""
        check_encoder("encoder", self.encoder)
        for axis, size, unit in zip(
            ("rows", "columns"), self.encoder.grid, self.mask_unit, strict=True
        ):
            require(
                size % unit == 0,
                "mask_unit",
                self.mask_unit,
                f"must tile the grid of patches: {size} {axis} are not divisible by {unit}",
            )
        units = math.prod(self.units)
        require(
            0 < self.hidden_units < units,
            "mask_ratio",
            self.mask_ratio,
            f"must show and hide one or more of {units} units of mask_unit={self.mask_unit}",
        )

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of units."""
        (rows, columns), (height, width) = self.encoder.grid, self.mask_unit
        return rows // height, columns // width

    @property
    def hidden_units(self) -> int:
        """Number of units that are hidden."""
        product = math.prod(self.units) * self.mask_ratio
        return math.ceil(product) if self.mask_rounds == "up" else math.floor(product)

    @property
    def hidden(self) -> int:
        """Number of patches that are hidden and painted."""
        return self.hidden_units * math.prod(self.mask_unit)

    def draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An order of the units for each image, all orders alike."""
        return {"order": draw_order(batch, math.prod(self.units), rng)}


def param_tree(config: SimMIMConfig) -> ParamTree:
    """The modules of SimMIM; it returns a number for each image."""
    encoder = config.encoder
    scheme, dim, patch_dim = Scheme(encoder.init_scheme), encoder.embed_dim, encoder.patch_dim
    kernel, bias = scheme.dense_kernel(dim, patch_dim), scheme.dense_bias(dim)
    return ParamTree(
        name="",
        params=(Param("mask_token", (1, 1, dim), Role.OWN, scheme.positions()),),
        children=(
            replace(vit.param_tree(encoder), name="encoder", output=None),
            dense("to_pixels", (encoder.patches,), dim, patch_dim, kernel, bias),
        ),
        output=(),
    )


VARIANTS: dict[str, SimMIMConfig] = {
    # Xie et al. 2022, section 4.1.2 and appendix; scales and drop path of the official configs.
    "simmim_vit_b16": SimMIMConfig(
        encoder=ViTConfig(num_classes=0, layer_scale_init=0.1, drop_path_rate=0.1, **SIZES["b"])
    ),
    # README of vit-pytorch, section "Simple Masked Image Modeling".
    "simmim_vit_pytorch": SimMIMConfig(
        encoder=VIT_PYTORCH.replace(num_classes=0, class_token=False, pool="mean"),
        mask_ratio=0.5,
        mask_rounds="down",
        mask_unit=(1, 1),
        divided_by_hidden=True,
    ),
}

PUBLISHED: dict[str, Published] = {}
"""Of the paper's own encoder, with relative positions, alone."""

ALIASES: dict[str, str] = {}
