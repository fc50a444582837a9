"""Do foreign checkpoints mean here what they mean where they come from?

A small random model of the original code is read through its rename table; every backend's float64
logits must be the original's. Then the weights are written back: the original must load them with
``strict=True`` and give the very same logits. Hypothesis draws the original's own arguments, and
each ``*_pairs`` strategy states, next to them, the config that they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isovit.backends.torch.layout import LAYOUT
from isovit.parity.job import draw_inputs
from isovit.spec.blocks import TransformerConfig
from isovit.spec.config import Preprocess
from isovit.spec.families import param_tree
from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from isovit.weight_convert.formats import rename_table
from parity_tests.agreement import assert_outputs_agree
from parity_tests.oracles import yitu
from parity_tests.oracles.importing import import_oracle
from parity_tests.strategies import MAX_WIDTH, MIN_WIDTH
from parity_tests.subject import Subject

pytestmark = pytest.mark.oracles

# The search over configs is that of ``test_forward``; here it is over the rows of the tables.
FEWER = settings(max_examples=max(5, settings.default.max_examples // 2))


@dataclass(frozen=True)
class Pair:
    """A model of an original library and the config that it should be.

    Attributes:
        arguments: of the original's constructor.
        config: of isovit.
    """

    arguments: dict[str, Any]
    config: TransformerConfig


def check(backend: Subject, format: str, make: Callable[..., nn.Module], pair: Pair) -> None:
    """Compare an original with a backend, and the original with itself after a round trip."""
    torch.manual_seed(0)  # of what ``randomised`` leaves: the performer's features
    config, original = pair.config, randomised(make(**pair.arguments))
    images = draw_inputs(config, batch=2, seed=0)[0]
    wanted = logits(original, images)

    state = {name: tensor.numpy() for name, tensor in original.state_dict().items()}
    table, params = rename_table(format, config), param_tree(config).parameters()
    weights = table.read(params, state, LAYOUT)
    model = backend.runtime.build(config, weights, dtype="float64", device="cpu")
    assert_outputs_agree(backend.runtime.forward(model, images), wanted)

    written = table.write(params, backend.runtime.read(model), LAYOUT)
    again = make(**pair.arguments).eval()
    again.load_state_dict({n: torch.tensor(a) for n, a in written.items()}, strict=True)
    np.testing.assert_array_equal(logits(again, images), wanted)


def randomised(model: nn.Module) -> nn.Module:
    """The model with weights under which every parameter shows; fixed ones stay."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                noise = torch.randn(param.shape, generator=generator)
                matrix = param.ndim > 1 and "token" not in name.rpartition(".")[2]
                is_scale = param.ndim == 1 and name.endswith("weight")
                # The performer's features are exponentials of its k and q.
                width = param[0].numel() * (16 if "kqv" in name else 1) if matrix else 25
                param.copy_(float(is_scale) + noise / width**0.5)
    return model.eval()


def logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """The original's float64 answer to (batch, height, width, channels) images."""
    with torch.inference_mode():
        return model.double()(torch.tensor(images).double().permute(0, 3, 1, 2)).numpy()


def statistics(in_channels: int) -> Preprocess:
    """Any statistics for so many channels."""
    return Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels)


depths, head_counts, channel_counts = st.integers(0, 2), st.integers(1, 3), st.integers(1, 4)
widths = st.integers(MIN_WIDTH, MAX_WIDTH)
patches = st.tuples(st.integers(3, 5), st.integers(2, 5))
grids = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def vit_pytorch_vits(draw: st.DrawFn) -> Pair:
    """vit-pytorch's ViT; without a projection where one head is as wide as the tokens."""
    (height, width), (rows, columns) = draw(patches), draw(grids)
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim, mlp_dim = draw(widths), draw(widths)
    dim_head = draw(st.sampled_from([dim, 5, 8]))
    pool, num_classes = draw(st.sampled_from(["cls", "mean"])), draw(st.integers(0, 5))
    arguments = dict(
        image_size=(rows * height, columns * width), patch_size=(height, width), channels=channels,
        num_classes=num_classes, dim=dim, depth=depth, heads=heads, dim_head=dim_head,
        mlp_dim=mlp_dim, pool=pool,
    )  # fmt: skip
    config = ViTConfig(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_classes,
        patch_embed="norm_linear_norm", pos_embed_tokens="all", embed_dim=dim, depth=depth,
        num_heads=heads, head_dim=dim_head, qkv_bias=False,
        attn_proj=not (heads == 1 and dim_head == dim), mlp_dim=mlp_dim, norm_eps=1e-5,
        class_token=pool == "cls", final_norm="tokens", pool=pool if num_classes else "none",
    )  # fmt: skip
    return Pair(arguments, config)


@st.composite
def t2t_layers(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """One to three (kernel, stride), of which the odd stride has no padding and must fit.

    Small kernels only: without a reduction the width grows with the square of each.
    """
    layers: list[tuple[int, int]] = []
    for i in range(draw(st.integers(1, 3))):
        fitting = [(3, 2), *[(3, 1)] * (size >= 3), *[(5, 4)] * (i == 0)]
        kernel, stride = draw(st.sampled_from(fitting))
        layers.append((kernel, stride))
        size = SoftSplit(kernel, stride, stride // 2).output(size)
    return layers


@st.composite
def vit_pytorch_t2t_vits(draw: st.DrawFn) -> Pair:
    """vit-pytorch's T2TViT: square images, a class token even where the mean is taken."""
    image_size, channels = draw(st.integers(3, 14)), draw(st.integers(1, 2))
    layers = draw(t2t_layers(image_size))
    depth, heads = draw(depths), draw(head_counts)
    dim, mlp_dim = draw(widths), draw(widths)
    dim_head = draw(st.sampled_from([dim, 5, 8]))
    pool, num_classes = draw(st.sampled_from(["cls", "mean"])), draw(st.integers(1, 5))
    arguments = dict(
        image_size=image_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
        mlp_dim=mlp_dim, pool=pool, channels=channels, dim_head=dim_head, t2t_layers=tuple(layers),
    )  # fmt: skip
    config = T2TViTConfig(
        image_size=(image_size, image_size), in_channels=channels, preprocess=statistics(channels),
        num_classes=num_classes, t2t_layers=tuple(SoftSplit(k, s, s // 2) for k, s in layers),
        token_mixer="full", pos_embed="learned", embed_dim=dim, depth=depth, num_heads=heads,
        head_dim=dim_head, qkv_bias=False, attn_proj=not (heads == 1 and dim_head == dim),
        mlp_dim=mlp_dim, norm_eps=1e-5, class_token=True, final_norm="tokens", pool=pool,
    )  # fmt: skip
    return Pair(arguments, config)


@st.composite
def timm_vits(draw: st.DrawFn) -> Pair:
    """timm's VisionTransformer; where it averages, the norm comes after, unless told otherwise."""
    (height, width), (rows, columns) = draw(patches), draw(grids)
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim = heads * draw(st.integers(-(-MIN_WIDTH // heads), MAX_WIDTH // heads))
    mlp_ratio, num_classes = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    global_pool = draw(st.sampled_from(["token", "avg"]))
    class_token = global_pool == "token" or draw(st.booleans())
    no_embed_class, qkv_bias = draw(st.booleans()), draw(st.booleans())
    init_values, fc_norm = draw(st.sampled_from([None, 0.1])), draw(st.sampled_from([None, False]))
    arguments = dict(
        img_size=(rows * height, columns * width), patch_size=(height, width), in_chans=channels,
        num_classes=num_classes, global_pool=global_pool, embed_dim=dim, depth=depth,
        num_heads=heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, init_values=init_values,
        class_token=class_token, no_embed_class=no_embed_class, fc_norm=fc_norm,
    )  # fmt: skip
    config = ViTConfig(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_classes,
        patch_embed="conv", pos_embed_tokens="patches" if no_embed_class else "all", embed_dim=dim,
        depth=depth, num_heads=heads, qkv_bias=qkv_bias, mlp_dim=dim * mlp_ratio, norm_eps=1e-6,
        layer_scale_init=init_values, class_token=class_token,
        final_norm="pooled" if global_pool == "avg" and fc_norm is None else "tokens",
        pool="cls" if global_pool == "token" else "mean_patches",
    )  # fmt: skip
    return Pair(arguments, config)


@st.composite
def yitu_vits(draw: st.DrawFn) -> Pair:
    """The official T2T-ViT: square images that 16 divides, one token among them."""
    img_size, channels = draw(st.sampled_from([16, 32])), draw(channel_counts)
    tokens_type = draw(st.sampled_from(["performer", "transformer"]))
    depth, heads = draw(depths), draw(head_counts)
    dim = heads * draw(st.integers(-(-MIN_WIDTH // heads), MAX_WIDTH // heads))
    token_dim, mlp_ratio = draw(widths), draw(st.integers(1, 3))
    num_classes, qk_scale = draw(st.integers(0, 5)), draw(st.sampled_from([None, 0.3]))
    arguments = dict(
        img_size=img_size, tokens_type=tokens_type, in_chans=channels, num_classes=num_classes,
        embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio, token_dim=token_dim,
        qk_scale=qk_scale,
    )  # fmt: skip
    config = T2TViTConfig(
        image_size=(img_size, img_size), in_channels=channels, preprocess=statistics(channels),
        num_classes=num_classes, token_mixer=tokens_type, token_dim=token_dim,
        token_mlp_dim=token_dim, performer_features=token_dim // 2, performer_upcast=True,
        embed_dim=dim, depth=depth, num_heads=heads, qkv_bias=False, attn_scale=qk_scale,
        mlp_dim=dim * mlp_ratio, norm_eps=1e-5,
    )  # fmt: skip
    return Pair(arguments, config)


@FEWER
@given(pair=vit_pytorch_vits())
def test_vit_pytorch_vit(backend: Subject, pair: Pair, pytestconfig: pytest.Config) -> None:
    library = import_oracle("vit_pytorch", pytestconfig)
    check(backend, "vit_pytorch", library.ViT, pair)


@FEWER
@given(pair=vit_pytorch_t2t_vits())
def test_vit_pytorch_t2t_vit(backend: Subject, pair: Pair, pytestconfig: pytest.Config) -> None:
    library = import_oracle("vit_pytorch.t2t", pytestconfig)
    check(backend, "vit_pytorch", library.T2TViT, pair)


@FEWER
@given(pair=timm_vits())
def test_timm_vit(backend: Subject, pair: Pair, pytestconfig: pytest.Config) -> None:
    library = import_oracle("timm.models.vision_transformer", pytestconfig)
    check(backend, "timm", library.VisionTransformer, pair)


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit3_small_patch16_224", {"pos_embed_tokens": "patches", "layer_scale_init": 1e-6}),
    ],
)
def test_timm_deit(
    backend: Subject, name: str, differs: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    """DeiT by timm's own entry points, whose conventions are then timm's choice, not the test's."""
    library = import_oracle("timm", pytestconfig)
    sizes = dict(img_size=(12, 8), patch_size=4, embed_dim=15, depth=2, num_heads=3, num_classes=5)
    config = ViTConfig(
        image_size=(12, 8), patch_size=(4, 4), embed_dim=15, depth=2, num_heads=3, mlp_dim=60,
        num_classes=5, **differs,
    )  # fmt: skip
    check(backend, "timm", library.create_model, Pair({"model_name": name, **sizes}, config))


@FEWER
@given(pair=yitu_vits())
def test_yitu_t2t_vit(backend: Subject, pair: Pair) -> None:
    check(backend, "yitu", yitu.T2TViT, pair)
