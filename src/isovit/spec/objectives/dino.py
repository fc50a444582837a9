"""DINO: a student learns to say of one view of an image what a teacher says of another.

Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers",
arXiv:2104.14294, section 3.1 and algorithm 1; the official code (facebookresearch/dino, Apache-2.0)
for what the paper leaves open; vit-pytorch's ``dino.py`` (MIT) for its form.

Student and teacher are the same model with the same head; both start alike. The student learns by
gradients, and the teacher is an average of the students that there were. Neither labels nor other
images are compared: what keeps the teacher from saying the same of all images is its centre, which
is subtracted, and its temperature. The two forms differ in the head, and in numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np

from isovit.errors import InputError
from isovit.spec import families
from isovit.spec.config import (
    Activation,
    BaseConfig,
    Config,
    ConfigError,
    Epsilon,
    InitScheme,
    NonNegative,
    Pair,
    Positive,
    require,
)
from isovit.spec.families.vit import SIZES, VIT_PYTORCH, ViTConfig
from isovit.spec.param import ONES, ZEROS, Init, Param, ParamTree, Role, dense, join, repeat
from isovit.spec.published import Published
from isovit.spec.scheme import Scheme


class DINOConfig(BaseConfig, frozen=True, kw_only=True, tag="dino"):
    """Config of DINO.

    Called with the student's views of each image, (batch, views, height, width, channels), and the
    teacher's, (batch, teacher_views, height, width, channels). The first of the student's views are
    the teacher's, or other crops that take their places: no view is compared with that of its own
    number, each other one is. In the official form those are the same crops; in vit-pytorch's, of
    each augmented image, a small crop is the student's and a large one the teacher's. Local views
    follow the student's others, (batch, local_views, height, width, channels) of a size of their
    own: small crops, each of which is compared with all that the teacher sees.

    Attributes:
        net: the model that learns, of any family: without a head, and one vector for an image. The
            teacher is the same without stochastic depth.
        views: of an image, that the student sees; all of the net's image size.
        teacher_views: that the teacher sees.
        local_views: of ``local_image_size``, that the student sees besides; only of a ViT. For them
            its positions are resampled within the model, by ``dino_bicubic``, where the grid of
            patches is another; those of the class token and the like stay.
        local_image_size: height and width of these, in pixels; of no account without them.
        head_layers: products of the head before its vector is given length 1.
        head_hidden_dim: width between them.
        bottleneck_dim: width of the last of them.
        head_last_activation: whether an activation stands behind the last of them, too.
        activation: behind the others.
        normalize_eps: least length by which that vector is divided.
        last_layer: ``weight_norm``, a product without bias, whose columns have each a length of
            its own (Salimans & Kingma 2016, arXiv:1602.07868, eq. 2); ``dense``, one with bias.
        last_gain_trains: whether these lengths train; else each is 1.
        out_dim: numbers that the head returns.
        student_temp: by which the student's are divided.
        teacher_temp: by which the teacher's are divided, the centre subtracted; a call may give
            another.
        init_scheme: of the head.
    """

    net: Config = ViTConfig(num_classes=0, drop_path_rate=0.1, **SIZES["s"])
    views: Positive = 2
    teacher_views: Positive = 2
    local_views: NonNegative = 0
    local_image_size: Pair = (96, 96)
    head_layers: Positive = 3
    head_hidden_dim: Positive = 2048
    bottleneck_dim: Positive = 256
    head_last_activation: bool = False
    activation: Activation = "gelu"
    normalize_eps: Epsilon = 1e-12
    last_layer: Literal["weight_norm", "dense"] = "weight_norm"
    last_gain_trains: bool = False
    out_dim: Positive = 65536
    student_temp: Epsilon = 0.1
    teacher_temp: Epsilon = 0.04
    init_scheme: InitScheme = "timm"

    def check(self) -> None:
        """Check that the net gives one vector, that views are compared, that no output is fixed."""
        classes = self.net.num_classes
        require(classes == 0, "net.num_classes", classes, "must be 0 here")
        output = families.param_tree(self.net).output
        require(
            output is not None and len(output) == 1,
            "net",
            self.net.family,
            f"must return one vector for an image, not the shape {output}: is pool=none?",
        )
        self._check_local_views()
        require(
            bool(self.pairs),
            "views",
            self.views,
            f"no pair of one with another of teacher_views={self.teacher_views}: needs two of one",
        )
        require(
            self.bottleneck_dim > 1,
            "bottleneck_dim",
            self.bottleneck_dim,
            "of length 1, one number is a sign: needs two or more",
        )
        require(self.out_dim > 1, "out_dim", self.out_dim, "one number is always probability 1")
        require(
            self.last_layer == "weight_norm" or not self.last_gain_trains,
            "last_gain_trains",
            self.last_gain_trains,
            "needs last_layer=weight_norm",
        )

    def _check_local_views(self) -> None:
        """Check that the net takes images of their size, if there are any."""
        if not self.local_views:
            return
        require(
            isinstance(self.net, ViTConfig),
            "local_views",
            self.local_views,
            f"needs a vit, whose size shows in nothing but its positions; got {self.net.family}",
        )
        try:
            self.net.replace(image_size=self.local_image_size)
        except ConfigError as error:
            given = f"local_image_size={self.local_image_size}"
            raise ConfigError(f"{given}: the net cannot take it: {error}") from None

    def check_images(self, shape: Sequence[int | None]) -> None:
        """See ``BaseConfig.check_images``; here of the student's views of the net's size."""
        self._check_views("images", self.input_shape, shape)

    def check_teacher_images(self, shape: Sequence[int | None]) -> None:
        """The same of the teacher's views.

        Raises:
            InputError: if it is not (batch, teacher_views, height, width, channels).
        """
        wanted = (self.teacher_views, *self.net.input_shape)
        self._check_views("teacher_images", wanted, shape)

    def check_local_images(self, shape: Sequence[int | None] | None) -> None:
        """The same of the local views; None for the shape of none.

        Raises:
            InputError: if it is not (batch, local_views, height, width, channels), or if there are
                none where some are wanted, or some where none are.
        """
        if self.local_views:
            self._check_views("local_images", self.local_shape, shape)
        elif shape is not None:
            raise InputError(
                f"local_images have the shape {tuple(shape)}; DINO wants none: local_views=0"
            )

    def _check_views(
        self, name: str, wanted: tuple[int, ...], shape: Sequence[int | None] | None
    ) -> None:
        if shape is None or tuple(shape[1:]) != wanted:
            came = "are missing" if shape is None else f"have the shape {tuple(shape)}"
            raise InputError(
                f"{name} {came}; DINO wants (batch, "
                f"{', '.join(map(str, wanted))}): batch, views, height, width, channels"
            )

    @property
    def parts(self) -> Mapping[str, Config]:
        """See ``BaseConfig.parts``."""
        return {"student.net": self.net, "teacher.net": self.teacher_net}

    @property
    def teacher_net(self) -> Config:
        """The teacher's model: the student's, of which no sample skips a branch."""
        skips = getattr(self.net, "drop_path_rate", 0.0) > 0
        return self.net.replace(drop_path_rate=0.0) if skips else self.net

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Number, height, width and channels of the student's views of an image, of one size."""
        return (self.views, *self.net.input_shape)

    @property
    def local_net(self) -> ViTConfig:
        """The net that local views go through: of their image size, all else the same."""
        return cast("ViTConfig", self.net.replace(image_size=self.local_image_size))

    @property
    def resizes(self) -> bool:
        """Whether the positions of local views are others than the net's."""
        return self.local_views > 0 and self.local_net.grid != cast("ViTConfig", self.net).grid

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Number, height, width and channels of the local views of an image."""
        return (self.local_views, *self.local_image_size, self.net.in_channels)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Which view of the teacher's is compared with which of the student's, by their numbers.

        The student's local views are numbered behind its others, and none of them is the teacher's.
        """
        return tuple(
            (theirs, ours)
            for theirs in range(self.teacher_views)
            for ours in range(self.views + self.local_views)
            if theirs != ours or ours >= self.views
        )

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Width of the features, and behind each product of the head up to the last."""
        features = families.param_tree(self.net).output or ()
        hidden = (self.head_hidden_dim,) * (self.head_layers - 1)
        return (*features, *hidden, self.bottleneck_dim)

    def draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The teacher's views and the student's local ones, standard normal."""
        shapes: dict[str, tuple[int, ...]] = {
            "teacher_images": (self.teacher_views, *self.net.input_shape)
        }
        if self.local_views:
            shapes["local_images"] = self.local_shape
        return {
            name: rng.standard_normal((batch, *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }


def param_tree(config: DINOConfig) -> ParamTree:
    """The modules of DINO; it returns a number for each image."""
    student = _student(config).renamed("student")
    teacher = _times(_network(config, config.net), config.teacher_views)
    teacher = _following(teacher, student.name)
    center = Param("center", (1, config.out_dim), Role.OWN, ZEROS, trainable=False, moves=True)
    return ParamTree(
        "", params=(center,), children=(student, teacher.renamed("teacher")), output=()
    )


def _student(config: DINOConfig) -> ParamTree:
    """The net with its head, which sees the local views last: their shapes are the outputs'."""
    tree = _times(_network(config, config.net), config.views)
    if not config.local_views:
        return tree
    tree = _then(tree, _times(_network(config, config.local_net), config.local_views))
    net, head = tree.children
    # Local views go through the parts of the net: what it returned itself was of another view.
    return replace(tree, children=(replace(net, output=None), head))


def _network(config: DINOConfig, net: Config) -> ParamTree:
    """The net with its head."""
    children = (families.param_tree(net).renamed("net"), _head(config))
    return ParamTree("", children=children, output=(config.out_dim,))


def _head(config: DINOConfig) -> ParamTree:
    scheme, dims = Scheme(config.init_scheme), config.head_dims

    def product(i: int) -> ParamTree:
        kernel, bias = scheme.dense_kernel(dims[i], dims[i + 1]), scheme.dense_bias(dims[i])
        return dense("", (), dims[i], dims[i + 1], kernel, bias)

    children = (repeat("mlp", config.head_layers, product), _last_layer(config, scheme))
    return ParamTree("head", children=children, output=(config.out_dim,))


def _last_layer(config: DINOConfig, scheme: Scheme) -> ParamTree:
    """The last product; under ``weight_norm`` its directions are drawn as torch draws kernels."""
    dim, dim_out = config.bottleneck_dim, config.out_dim
    if config.last_layer == "dense":
        kernel, bias = scheme.dense_kernel(dim, dim_out), scheme.dense_bias(dim)
        return dense("last_layer", (), dim, dim_out, kernel, bias)
    product = dense("last_layer", (), dim, dim_out, Init("uniform", dim**-0.5), None)
    gain = Param("gain", (dim_out,), Role.OWN, ONES, trainable=config.last_gain_trains)
    return replace(product, params=(*product.params, gain))


def _times(tree: ParamTree, runs: int) -> ParamTree:
    """The same modules, run several times for an image."""
    children = tuple(_times(child, runs) for child in tree.children)
    return replace(tree, own_macs=runs * tree.own_macs, children=children)


def _then(tree: ParamTree, last: ParamTree) -> ParamTree:
    """The same modules, run once more as those of another tree: the outputs are that tree's."""
    children = tuple(
        _then(child, other) for child, other in zip(tree.children, last.children, strict=True)
    )
    macs = tree.own_macs + last.own_macs
    return replace(tree, own_macs=macs, children=children, output=last.output)


def _following(tree: ParamTree, path: str) -> ParamTree:
    """The same modules, which no gradient trains, and which start as those under a path."""
    params = tuple(
        replace(p, trainable=False, source=join(path, p.name), moves=p.trainable)
        for p in tree.params
    )
    children = tuple(_following(child, join(path, child.name)) for child in tree.children)
    return replace(tree, params=params, children=children)


# README of vit-pytorch, section "Dino"; the class itself has out_dim=65336, a slip.
PYTORCH: dict[str, Any] = dict(
    net=VIT_PYTORCH.replace(num_classes=0),
    head_hidden_dim=256,
    head_last_activation=True,
    normalize_eps=1e-6,
    last_layer="dense",
    student_temp=0.9,
    init_scheme="vit_pytorch",
)

PAPER = "Caron et al. 2021, arXiv:2104.14294, table 2"

VARIANTS: dict[str, DINOConfig] = {
    # Caron et al. 2021, section 3.2; numbers of the head, local views and stochastic depth of the
    # official code.
    "dino_vit_s16": DINOConfig(local_views=8),
    "dino_vit_pytorch": DINOConfig(**PYTORCH),
}

# A linear classifier on the frozen teacher.
PUBLISHED: dict[str, Published] = {"dino_vit_s16": Published(PAPER, 77.0)}

ALIASES: dict[str, str] = {}
