"""Small models of original libraries, each beside the config that it means.

Hypothesis draws the original's own arguments; the strategy states, next to them, the config. What
neither the names nor the shapes of the weights tell of it is stated as well, so that a test can
give that alone and have all the rest found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from isovit.spec.config import Config, Preprocess
from isovit.spec.families.t2t_vit import SoftSplit, T2TViTConfig
from isovit.spec.families.vit import ViTConfig
from parity_tests.oracles import google
from parity_tests.strategies import MAX_WIDTH, MIN_WIDTH


@dataclass(frozen=True)
class Pair:
    """A model of an original library and the config that it should be.

    Attributes:
        arguments: of the original's constructor.
        config: of isovit; preprocessing and initialisation are not compared.
        untold: its fields that nothing in the weights tells; None where they tell too little
            to find the rest.
    """

    arguments: dict[str, Any]
    config: Config
    untold: tuple[str, ...] | None = ()

    @property
    def given(self) -> dict[str, Any]:
        """What a user has to say of the weights."""
        if self.untold is None:
            return {"config": self.config}
        fields = self.config.to_dict()
        return {"changes": {name: fields[name] for name in self.untold}}


BLOCKS = ("num_heads", "mlp_dim", "qkv_bias", "layer_scale_init")
"""What weights without a block do not tell, and nothing depends on."""


def statistics(in_channels: int) -> Preprocess:
    """Any statistics for so many channels."""
    return Preprocess(mean=(0.5,) * in_channels, std=(0.5,) * in_channels)


depths, head_counts, channel_counts = st.integers(0, 2), st.integers(1, 3), st.integers(1, 4)
widths = st.integers(MIN_WIDTH, MAX_WIDTH)
patches = st.tuples(st.integers(3, 5), st.integers(2, 5))
grids = st.tuples(st.integers(1, 3), st.integers(1, 3))
class_counts = st.integers(0, 5)


def divisible(heads: int, unit: int = 1) -> st.SearchStrategy[int]:
    """Widths that so many heads fill, each a multiple of ``unit``."""
    step = heads * unit
    return st.integers(-(-MIN_WIDTH // step), max(MAX_WIDTH // step, 1)).map(lambda n: n * step)


@st.composite
def vit_pytorch_vits(draw: st.DrawFn) -> Pair:
    """vit-pytorch's ViT; without a projection where one head is as wide as the tokens."""
    (height, width), (rows, columns) = draw(patches), draw(grids)
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim, mlp_dim = draw(widths), draw(widths)
    dim_head = draw(st.sampled_from([dim, 5, 8]))
    pool, num_classes = draw(st.sampled_from(["cls", "mean"])), draw(class_counts)
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
    untold = ("image_size", "patch_size", "num_heads", *HEADS[depth > 0])
    return Pair(arguments, config, untold)


HEADS = {True: (), False: ("head_dim", "attn_proj", "mlp_dim")}
"""By whether there is a block, what else vit-pytorch's weights do not tell."""


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
    untold = ("image_size", "in_channels", "t2t_layers", "pool", "num_heads", *HEADS[depth > 0])
    # A single soft split leaves nothing but a product: no name says where it stands.
    return Pair(arguments, config, untold if len(layers) > 1 else None)


@st.composite
def timm_vits(draw: st.DrawFn) -> Pair:
    """timm's VisionTransformer; where it averages, the norm comes after, unless told otherwise."""
    (height, width), (rows, columns) = draw(patches), draw(grids)
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim, mlp_ratio, num_classes = (
        draw(divisible(heads)),
        draw(st.integers(1, 3)),
        draw(class_counts),
    )
    global_pool = draw(st.sampled_from(["token", "avg", *[""] * (num_classes == 0)]))
    class_token = global_pool == "token" or draw(st.booleans())
    no_embed_class, qkv_bias = draw(st.booleans()), draw(st.booleans())
    init_values = draw(st.sampled_from([None, 0.1]))
    fc_norm = draw(st.sampled_from([None, False, *[True] * (global_pool != "")]))
    arguments = dict(
        img_size=(rows * height, columns * width), patch_size=(height, width), in_chans=channels,
        num_classes=num_classes, global_pool=global_pool, embed_dim=dim, depth=depth,
        num_heads=heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, init_values=init_values,
        class_token=class_token, no_embed_class=no_embed_class, fc_norm=fc_norm,
    )  # fmt: skip
    pooled = global_pool == "avg" if fc_norm is None else fc_norm
    config = ViTConfig(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_classes,
        pos_embed_tokens="patches" if no_embed_class and class_token else "all", embed_dim=dim,
        depth=depth, num_heads=heads, qkv_bias=qkv_bias, mlp_dim=dim * mlp_ratio, norm_eps=1e-6,
        layer_scale_init=init_values, class_token=class_token,
        final_norm="pooled" if pooled else "tokens",
        pool={"token": "cls", "avg": "mean_patches", "": "none"}[global_pool],
    )  # fmt: skip
    return Pair(arguments, config, timm_untold(config))


@st.composite
def timm_distilled_vits(draw: st.DrawFn) -> Pair:
    """timm's VisionTransformerDistilled: two tokens, two heads."""
    (height, width), (rows, columns) = draw(patches), draw(grids)
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim, mlp_ratio, num_classes = draw(divisible(heads)), draw(st.integers(1, 3)), draw(classes)
    qkv_bias, init_values = draw(st.booleans()), draw(st.sampled_from([None, 0.1]))
    arguments = dict(
        img_size=(rows * height, columns * width), patch_size=(height, width), in_chans=channels,
        num_classes=num_classes, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias, init_values=init_values,
    )  # fmt: skip
    config = ViTConfig(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_classes,
        embed_dim=dim, depth=depth, num_heads=heads, qkv_bias=qkv_bias, mlp_dim=dim * mlp_ratio,
        norm_eps=1e-6, layer_scale_init=init_values, dist_token=True, dist_head=True,
    )  # fmt: skip
    return Pair(arguments, config, timm_untold(config))


classes = st.integers(1, 5)


def timm_untold(config: ViTConfig) -> tuple[str, ...]:
    """What timm's weights do not tell: the start of a layer scale is the reader's guess too."""
    always = ("image_size", "pool", "num_heads", "layer_scale_init")
    return always if config.depth else tuple({*always, *BLOCKS})


@st.composite
def yitu_vits(draw: st.DrawFn) -> Pair:
    """The official T2T-ViT: square images that 16 divides, one token among them."""
    img_size, channels = draw(st.sampled_from([16, 32])), draw(channel_counts)
    tokens_type = draw(st.sampled_from(["performer", "transformer"]))
    depth, heads = draw(depths), draw(head_counts)
    dim, token_dim, mlp_ratio = draw(divisible(heads)), draw(widths), draw(st.integers(1, 3))
    num_classes, qk_scale = draw(class_counts), draw(st.sampled_from([None, 0.3]))
    arguments = dict(
        img_size=img_size, tokens_type=tokens_type, in_chans=channels, num_classes=num_classes,
        embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio, token_dim=token_dim,
        qk_scale=qk_scale,
    )  # fmt: skip
    performer = tokens_type == "performer"
    config = T2TViTConfig(
        image_size=(img_size, img_size), in_channels=channels, preprocess=statistics(channels),
        num_classes=num_classes, token_mixer=tokens_type, token_dim=token_dim,
        token_mlp_dim=token_dim, performer_upcast=True,
        performer_features=token_dim // 2 if performer else 32,
        token_dropout_rate=0.1 if performer else 0.0,
        embed_dim=dim, depth=depth, num_heads=heads, qkv_bias=False, attn_scale=qk_scale,
        mlp_dim=dim * mlp_ratio, norm_eps=1e-5,
    )  # fmt: skip
    untold = ("num_heads", "attn_scale", *["mlp_dim"] * (depth == 0))
    return Pair(arguments, config, untold)


@st.composite
def hf_models(draw: st.DrawFn, kind: str) -> Pair:
    """A model of transformers by the name of its class; ``config.json`` tells all that it is.

    DeiT has a second token, and a second head where there was a teacher; ViTModel and ViTMAEModel
    have no head. The positions of MAE are a fixed table over a square grid, its width a multiple of
    four.
    """
    mae, deit = "MAE" in kind, "DeiT" in kind
    (height, width), (rows, columns) = draw(patches), draw(grids)
    if mae:
        width, columns = height, rows
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim, intermediate_size = draw(divisible(heads, 4 if mae else 1)), draw(widths)
    least = 1 if "WithTeacher" in kind else 0  # without heads it averages the two tokens
    num_labels = draw(st.integers(least, 5)) if kind.endswith(("Classification", "Teacher")) else 0
    qkv_bias, norm_eps = draw(st.booleans()), draw(st.sampled_from([1e-12, 1e-6, 1e-3]))
    hidden_act = draw(st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh"]))
    arguments: dict[str, Any] = dict(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        num_channels=channels, num_labels=num_labels, hidden_size=dim, num_hidden_layers=depth,
        num_attention_heads=heads, intermediate_size=intermediate_size, qkv_bias=qkv_bias,
        layer_norm_eps=norm_eps, hidden_act=hidden_act,
    )  # fmt: skip
    if mae:
        arguments |= dict(
            mask_ratio=0.0, decoder_hidden_size=8, decoder_num_attention_heads=2,
            decoder_intermediate_size=12, decoder_num_hidden_layers=1,
        )  # fmt: skip
    config = ViTConfig(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_labels,
        embed_dim=dim, depth=depth, num_heads=heads, qkv_bias=qkv_bias, mlp_dim=intermediate_size,
        norm_eps=norm_eps, activation="gelu" if hidden_act == "gelu" else "gelu_tanh",
        dist_token=deit, dist_head="WithTeacher" in kind,
    )  # fmt: skip
    # At depth 0 only ``config.json`` tells the width of the MLP and of the bias, and nobody asks.
    return Pair(arguments, config, ("mlp_dim", "qkv_bias") if depth == 0 else ())


@st.composite
def google_vits(draw: st.DrawFn, names: google.Names) -> Pair:
    """vit_jax or big_vision: with a class token or the mean over patches, with ``pre_logits``."""
    (height, width), (rows, columns) = draw(patches), draw(grids)
    depth, heads, channels = draw(depths), draw(head_counts), draw(channel_counts)
    dim, mlp_dim, num_classes = draw(divisible(heads)), draw(widths), draw(class_counts)
    classifier = draw(st.sampled_from(["token", "gap"]))
    representation_size = draw(st.none() | widths)
    sizes = google.Sizes(
        (height, width), (rows, columns), channels, dim, depth, heads, mlp_dim, classifier,
        representation_size, num_classes,
    )  # fmt: skip
    token = classifier == "token"
    config = ViTConfig(
        image_size=(rows * height, columns * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_classes,
        embed_dim=dim, depth=depth, num_heads=heads, qkv_bias=True, mlp_dim=mlp_dim,
        norm_eps=1e-6, activation="gelu_tanh", class_token=token,
        pos_embed_tokens="patches" if token and names.positions_first else "all",
        pool="cls" if token else "mean_patches", pre_logits_dim=representation_size,
    )  # fmt: skip
    untold = ("image_size", *["num_heads", "mlp_dim"][: 2 * (depth == 0)])
    return Pair({"names": names, "sizes": sizes}, config, untold)
