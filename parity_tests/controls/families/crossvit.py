"""Planted faults of CrossViT: what ports of it get wrong, from resizing to the mean of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.families import crossvit
from isovit.spec.families.crossvit import CrossViTConfig
from parity_tests.controls.faults import (
    Fault,
    GradientFault,
    Model,
    Patch,
    modules,
    rewrite,
)

OFFICIAL = CrossViTConfig(
    image_size=(12, 18), image_scale=(1.0, 2 / 3), patch_size=(6, 4), depth=2, branch_depth=(1, 2),
    embed_dim=(12, 18), num_heads=(2, 3), mlp_dim=(20, 30), num_classes=5,
)  # fmt: skip
SAME = OFFICIAL.replace(embed_dim=(18, 18), num_heads=(3, 3))
PYTORCH = OFFICIAL.replace(
    image_scale=(1.0, 1.0), patch_size=(3, 6), patch_embed="norm_linear_norm", qkv_bias=False,
    stage_norm=True, fusion="residual", cross_depth=2, cross_num_heads=2, cross_head_dim=5,
    norm_eps=1e-5, logits="sum",
)  # fmt: skip

CASES: dict[str, Any] = {
    "crossvit": OFFICIAL,
    "crossvit_same": SAME,  # branches of one width, in which no shape tells one from the other
    "crossvit_dagger": OFFICIAL.replace(
        image_size=24, image_scale=(1.0, 4 / 3), patch_size=(12, 16), patch_embed="conv_stem"
    ),
    "crossvit_cropped": OFFICIAL.replace(
        image_size=(9, 18), image_scale=(4 / 9, 2 / 3), patch_size=(2, 3), scaling="crop"
    ),
    "crossvit_pytorch": PYTORCH,
    "crossvit_features": OFFICIAL.replace(num_classes=0),
}  # fmt: skip


# --- scaffolds: a forward with one exchangeable part ---------------------------------------------


def by_torch(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The sound resizing: PyTorch's own."""
    return F.interpolate(images, size, mode="bicubic", align_corners=False)


def rewrite_resize(model: Model, resize: Callable[[Tensor, tuple[int, int]], Tensor]) -> None:
    """Give all resizings one of (batch, channels, height, width) images."""

    def forward(module: Any, images: Tensor) -> Tensor:
        size = (len(module.rows), len(module.columns))
        return resize(images.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)

    rewrite(modules(model, crossvit.BicubicResize), forward)


def normed_together(fusion: Any, x: Tensor, patches: Tensor) -> Tensor:
    """The sound context of a projected fusion."""
    return fusion.norm(torch.cat([x, patches], dim=1))


def attended(fusion: Any, x: Tensor, context: Tensor) -> Tensor:
    """The sound residual of a projected fusion."""
    return x + fusion.attn(context[:, :1], context)


def replaced(token: Tensor, new: Tensor) -> Tensor:
    """The sound fate of the class token in a projected fusion."""
    return new


def rewrite_projected(
    model: Model,
    *,
    context: Callable[[Any, Tensor, Tensor], Tensor] = normed_together,
    attend: Callable[[Any, Tensor, Tensor], Tensor] = attended,
    activation: Callable[[Tensor], Tensor] = F.gelu,
    token_out: Callable[[Tensor, Tensor], Tensor] = replaced,
) -> None:
    """Give all projected fusions a forward with one part exchanged."""

    def forward(fusion: Any, token: Tensor, patches: Tensor) -> Tensor:
        x = fusion.proj_in(activation(fusion.norm_in(token)))
        x = attend(fusion, x, context(fusion, x, patches))
        return token_out(token, fusion.proj_out(activation(fusion.norm_out(x))))

    rewrite(modules(model, crossvit.ProjectedFusion), forward)


def class_token_before_patches(layer: Any, x: Tensor, patches: Tensor) -> Tensor:
    """The sound context of vit-pytorch's fusion: the patches are not normalised."""
    return torch.cat([x, patches], dim=1)


def rewrite_residual(
    model: Model,
    *,
    context: Callable[[Any, Tensor, Tensor], Tensor] = class_token_before_patches,
    token_out: Callable[[Any, Tensor, Tensor], Tensor] = lambda layer, x, y: layer.proj_out(y),
) -> None:
    """Give all layers of vit-pytorch's fusions a forward with one part exchanged."""

    def forward(layer: Any, token: Tensor, patches: Tensor) -> Tensor:
        x = layer.norm(layer.proj_in(token))
        return token_out(layer, x, layer.attn(x, context(layer, x, patches)))

    rewrite(modules(model, crossvit.CrossLayer), forward)


def at_once(stage: Any, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
    """The sound exchange: each fusion gets what the blocks gave."""
    return (
        stage.fusions[0](small[:, :1], large[:, 1:]),
        stage.fusions[1](large[:, :1], small[:, 1:]),
    )


def rewrite_stages(
    model: Model, exchange: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Give all stages another exchange of class tokens."""

    def forward(stage: Any, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        small, large = stage.encoders[0](small), stage.encoders[1](large)
        small_token, large_token = exchange(stage, small, large)
        return (
            torch.cat([small_token, small[:, 1:]], dim=1),
            torch.cat([large_token, large[:, 1:]], dim=1),
        )

    rewrite(modules(model, crossvit.MultiScaleStage), forward)


# --- faults --------------------------------------------------------------------------------------


def resized_with_antialias(model: Model, _: Patch) -> None:
    """``jax.image.resize``: it antialiases where it shrinks, and its cubic has a = -0.5."""
    rewrite_resize(
        model,
        lambda x, size: F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True),
    )


def resized_corners_on_corners(model: Model, _: Patch) -> None:
    """``align_corners=True``, the default of interpolation in early PyTorch."""
    rewrite_resize(
        model, lambda x, size: F.interpolate(x, size, mode="bicubic", align_corners=True)
    )


def resized_linearly(model: Model, _: Patch) -> None:
    """Bilinear: the default of ``tf.image.resize`` and of ``keras.ops.image.resize``."""
    rewrite_resize(
        model, lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False)
    )


def cropped_at_the_corner(model: Model, _: Patch) -> None:
    """A crop that starts at the first pixel: hand ports."""
    for crop in modules(model, crossvit.CentreCrop):
        crop.corner = (0, 0)


def halves_rounded_up(model: Model, _: Patch) -> None:
    """round(2.5) taken as 3, as JavaScript and C have it; Python rounds halves to even."""
    for embed, branch in zip(model.embeds, model.config.branches, strict=True):
        sizes = zip(branch.source_size, branch.image_size, strict=True)
        embed.resize.corner = tuple((old - new + 1) // 2 for old, new in sizes)


def relu_missing(model: Model, _: Patch) -> None:
    """The stem as three convolutions in a row: nothing in the weights tells of the ReLUs."""

    def forward(stem: Any, images: Tensor) -> Tensor:
        return stem.conv3(stem.conv2(stem.conv1(images))).flatten(1, 2)

    rewrite(modules(model, crossvit.ConvStem), forward)


def gelu_in_the_stem(model: Model, _: Patch) -> None:
    """GELU for ReLU in the stem, as everywhere else in the model."""

    def forward(stem: Any, images: Tensor) -> Tensor:
        x = F.gelu(stem.conv2(F.gelu(stem.conv1(images))))
        return stem.conv3(x).flatten(1, 2)

    rewrite(modules(model, crossvit.ConvStem), forward)


def branches_exchanged(model: Model, _: Patch) -> None:
    """Small and large taken for each other in the fusion: in widths alike every shape fits."""
    for stage in modules(model, crossvit.MultiScaleStage):
        stage.fusions = nn.ModuleList(reversed(stage.fusions))


def own_patches_read(model: Model, _: Patch) -> None:
    """Each class token reads its own branch again: self-attention once more; hand ports."""
    rewrite_stages(
        model,
        lambda stage, small, large: (
            stage.fusions[0](small[:, :1], small[:, 1:]),
            stage.fusions[1](large[:, :1], large[:, 1:]),
        ),
    )


def activation_missing(model: Model, _: Patch) -> None:
    """Projections as norm and dense layer: their GELU has no weights; the paper's f and g."""
    rewrite_projected(model, activation=lambda x: x)


def class_token_not_normed(model: Model, _: Patch) -> None:
    """LayerNorm over the other branch's patches alone, as the keys of many decoders have it."""
    rewrite_projected(
        model,
        context=lambda fusion, x, patches: torch.cat([x, fusion.norm(patches)], dim=1),
    )


def patches_alone_attended(model: Model, _: Patch) -> None:
    """Keys and values without the class token itself, as in a decoder's cross-attention."""
    rewrite_projected(
        model,
        attend=lambda fusion, x, context: x + fusion.attn(context[:, :1], context[:, 1:]),
    )


def residual_missing(model: Model, _: Patch) -> None:
    """The attention's output alone: eq. 7 adds the class token to it."""
    rewrite_projected(model, attend=lambda fusion, x, context: fusion.attn(context[:, :1], context))


def residual_at_own_width(model: Model, _: Patch) -> None:
    """The class token added again behind the way back: vit-pytorch's residual, not the paper's."""
    rewrite_projected(model, token_out=lambda token, new: token + new)


def patches_normed(model: Model, _: Patch) -> None:
    """The paper's LayerNorm over class token and patches, in vit-pytorch's form."""

    def context(layer: Any, x: Tensor, patches: Tensor) -> Tensor:
        norm = layer.norm  # not called: the trace keeps its output for the class token
        normed = F.layer_norm(patches, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return torch.cat([x, normed], dim=1)

    rewrite_residual(model, context=context)


def layers_read_once(model: Model, _: Patch) -> None:
    """All layers of a fusion read the class token that came in, not what the last one gave."""

    def forward(fusion: Any, token: Tensor, patches: Tensor) -> Tensor:
        return token + sum(layer(token, patches) for layer in fusion.layers)

    rewrite(modules(model, crossvit.ResidualFusion), forward)


def scale_by_width(model: Model, _: Patch) -> None:
    """1/√dim for 1/√head_dim: the slip that timm's source remembers of its first version."""
    for attn in modules(model, crossvit.CrossAttention):
        attn.scale = attn.proj.out_features**-0.5


def k_and_v_swapped(model: Model, _: Patch) -> None:
    """Fused in the order v, k: Keras calls attention with (query, value, key)."""
    for attn in modules(model, crossvit.CrossAttention):
        for parameter in attn.kv.parameters():
            parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def stage_norm_missing(model: Model, _: Patch) -> None:
    """No LayerNorm at the end of vit-pytorch's Transformers, as the official blocks have none."""
    for encoder in modules(model, crossvit.Encoder):
        encoder.norm = nn.Identity()


def heads_summed(model: Model, _: Patch) -> None:
    """vit-pytorch's sum for the official mean: classes keep their order, the loss does not."""
    model.config = model.config.replace(logits="sum")


def heads_averaged(model: Model, _: Patch) -> None:
    """The official mean for vit-pytorch's sum."""
    model.config = model.config.replace(logits="mean")


def features_of_large_first(model: Model, _: Patch) -> None:
    """Features in the other order, by how coarse they are, as feature pyramids have them."""

    def swap(_: nn.Module, args: object, output: Tensor) -> Tensor:
        small = model.config.embed_dim[0]
        return torch.cat([output[:, small:], output[:, :small]], dim=-1)

    model.register_forward_hook(swap)


EMBED, FUSION = "embeds.1.", "stages.0.fusions.0."

FAULTS = (
    Fault(resized_with_antialias, "crossvit", EMBED + "resize"),
    Fault(resized_with_antialias, "crossvit_dagger", EMBED + "resize"),
    Fault(resized_corners_on_corners, "crossvit", EMBED + "resize"),
    Fault(resized_linearly, "crossvit_dagger", EMBED + "resize"),
    Fault(cropped_at_the_corner, "crossvit_cropped", "embeds.0.patch_embed.proj"),
    Fault(halves_rounded_up, "crossvit_cropped", "embeds.0.patch_embed.proj"),
    Fault(relu_missing, "crossvit_dagger", "embeds.0.patch_embed.conv2"),
    Fault(gelu_in_the_stem, "crossvit_dagger", "embeds.0.patch_embed.conv2"),
    Fault(branches_exchanged, "crossvit_same", FUSION + "norm_in"),
    Fault(own_patches_read, "crossvit_same", FUSION + "norm"),
    Fault(activation_missing, "crossvit", FUSION + "proj_in"),
    Fault(class_token_not_normed, "crossvit", FUSION + "norm"),
    Fault(patches_alone_attended, "crossvit", FUSION + "attn.kv"),
    Fault(residual_missing, "crossvit", FUSION + "norm_out"),
    Fault(residual_at_own_width, "crossvit", FUSION.rstrip(".")),
    Fault(patches_normed, "crossvit_pytorch", FUSION + "layers.0.attn.kv"),
    Fault(layers_read_once, "crossvit_pytorch", FUSION + "layers.1.proj_in"),
    Fault(scale_by_width, "crossvit", FUSION + "attn.proj"),
    Fault(k_and_v_swapped, "crossvit", FUSION + "attn.kv"),
    Fault(k_and_v_swapped, "crossvit_pytorch", FUSION + "layers.0.attn.kv"),
    Fault(stage_norm_missing, "crossvit_pytorch", "stages.0.encoders.0.norm"),
    Fault(heads_summed, "crossvit"),
    Fault(heads_averaged, "crossvit_pytorch"),
    Fault(features_of_large_first, "crossvit_features"),
)


# --- harmless rewrites ---------------------------------------------------------------------------


def resized_by_torch(model: Model, _: Patch) -> None:
    """The scaffold of the faults in resizing, with PyTorch's own bicubic interpolation."""
    rewrite_resize(model, by_torch)


def columns_before_rows(model: Model, _: Patch) -> None:
    """The two products of a resizing in the other order."""

    def forward(module: Any, images: Tensor) -> Tensor:
        x = torch.einsum("sw,bhwc->bhsc", module.columns, images)
        return torch.einsum("rh,bhsc->brsc", module.rows, x)

    rewrite(modules(model, crossvit.BicubicResize), forward)


def fusions_written_out(model: Model, _: Patch) -> None:
    """The scaffolds of the faults in fusions, with nothing exchanged."""
    rewrite_projected(model)
    rewrite_residual(model)


def stages_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults between branches, with nothing exchanged."""
    rewrite_stages(model, at_once)


def large_branch_first(model: Model, _: Patch) -> None:
    """The fusions in the other order: neither sees what the other gives."""

    def exchange(stage: Any, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        large_token = stage.fusions[1](large[:, :1], small[:, 1:])
        return stage.fusions[0](small[:, :1], large[:, 1:]), large_token

    rewrite_stages(model, exchange)


HARMLESS = (
    Fault(resized_by_torch, "crossvit"),
    Fault(resized_by_torch, "crossvit_dagger"),
    Fault(columns_before_rows, "crossvit"),
    Fault(fusions_written_out, "crossvit"),
    Fault(fusions_written_out, "crossvit_pytorch"),
    Fault(stages_written_out, "crossvit_same"),
    Fault(stages_written_out, "crossvit_pytorch"),
    Fault(large_branch_first, "crossvit"),
)


# --- faults that only a gradient shows -----------------------------------------------------------


def keys_detached(model: Model, _: Patch) -> None:
    """The other branch taken as a constant, as target networks are: no gradient through fusion."""
    rewrite_stages(
        model,
        lambda stage, small, large: (
            stage.fusions[0](small[:, :1], large[:, 1:].detach()),
            stage.fusions[1](large[:, :1], small[:, 1:].detach()),
        ),
    )


def resize_detached(model: Model, _: Patch) -> None:
    """Resizing as part of the preprocessing: the image gets no gradient from that branch."""
    rewrite_resize(model, lambda x, size: by_torch(x.detach(), size))


GRADIENT_FAULTS = (
    # fault, model, a gradient that is wrong, one that is right
    GradientFault(keys_detached, "crossvit", EMBED + "patch_embed.proj.kernel", "norm.0.scale"),
    GradientFault(
        keys_detached, "crossvit_pytorch", EMBED + "patch_embed.proj.kernel", "norm.0.scale"
    ),
    GradientFault(resize_detached, "crossvit", "images", EMBED + "patch_embed.proj.kernel"),
)
