"""Faults of ports of CaiT, planted into the PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isovit.backends.torch.families import cait
from isovit.spec.families.cait import CaiTConfig
from parity_tests.controls.blocks import norm_eps_of_torch, softmax_over_keys
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

OFFICIAL = CaiTConfig(
    image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=2, num_heads=3, mlp_dim=30,
    num_classes=5,
)  # fmt: skip
CASES: dict[str, Any] = {
    "cait": OFFICIAL,
    "cait_pytorch": OFFICIAL.replace(
        patch_embed="norm_linear_norm", qkv_bias=False, talking_heads_bias=False,
        cls_talking_heads=True, cls_norm="cls", norm_eps=1e-5,
    ),
}  # fmt: skip

Mix = Callable[[Tensor], Tensor]


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def mixed_weights(talk: Any, logits: Tensor, softmax: Mix) -> Tensor:
    """The sound order: mix, softmax, mix."""
    return talk.proj_w(softmax(talk.proj_l(logits)))


def rewrite_talking_heads(
    model: Model,
    *,
    weights: Callable[[Any, Tensor, Mix], Tensor] = mixed_weights,
    softmax: Mix = softmax_over_keys,
) -> None:
    """Give all heads that talk a forward with one part exchanged."""

    def forward(talk: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights(talk, q @ k.mT * talk.scale, softmax) @ v

    rewrite(modules(model, cait.TalkingHeads), forward)


def all_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The sound keys and values: of the class token and of the patches."""
    return k, v


def rewrite_class_attention(
    model: Model, keys: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = all_keys
) -> None:
    """Give all class attentions of silent heads other keys and values."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        q = attn.q(x[:, :1]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        kv = attn.kv(x).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = keys(*kv.unbind(0))
        y = softmax_over_keys(q @ k.mT * attn.scale) @ v
        return attn.proj(y.transpose(1, 2).flatten(2))

    rewrite(modules(model, cait.ClassAttention), forward)


def normed_tokens(block: Any, cls: Tensor, x: Tensor) -> Tensor:
    """What the class attention of the sound model gets."""
    if block.cls_norm == "tokens":
        return block.norm1(torch.cat([cls, x], dim=1))
    return torch.cat([block.norm1(cls), x], dim=1)


def rewrite_class_blocks(
    model: Model, tokens: Callable[[Any, Tensor, Tensor], Tensor] = normed_tokens
) -> None:
    """Give all class blocks a forward whose attention gets other tokens."""

    def forward(block: Any, cls: Tensor, x: Tensor) -> Tensor:
        cls = cls + block.layer_scale1(block.attn(tokens(block, cls, x)))
        return cls + block.layer_scale2(block.mlp(block.norm2(cls)))

    rewrite(modules(model, cait.ClassBlock), forward)


def seen_as_they_are(_: Any, x: Tensor) -> Tensor:
    """The patches that the class block after this one of the sound model sees."""
    return x


def rewrite_model(
    model: Model,
    *,
    blocks: Callable[[Any, Tensor], Tensor] = lambda model, x: nn.Sequential(*model.blocks)(x),
    carry: Callable[[Any, Tensor], Tensor] = seen_as_they_are,
) -> None:
    """Give a CaiT a forward with one part exchanged."""

    def forward(model: Any, images: Tensor) -> Tensor:
        x = blocks(model, model.patch_embed(images) + model.pos_embed)
        cls = model.cls_token.expand(len(x), -1, -1)
        for block in model.cls_blocks:
            cls = block(cls, x)
            x = carry(block, x)
        return model.head(model.norm(torch.cat([cls, x], dim=1))[:, 0])

    rewrite([model], forward)


# --- faults: heads that talk ----------------------------------------------------------------------


def mix_transposed(model: Model, _: Patch) -> None:
    """vit-pytorch sums over the first index of its matrices, a Linear over the second."""
    for mix in modules(model, cait.MixHeads):
        mix.weight.data = mix.weight.data.T.contiguous()


def heads_silent(model: Model, _: Patch) -> None:
    """Checkpoint read with strict=False into the blocks of a ViT, whose heads do not talk."""
    rewrite(modules(model, cait.MixHeads), lambda mix, x: x)


def weights_unmixed(model: Model, _: Patch) -> None:
    """Only the logits are mixed; hand ports."""
    rewrite([talk.proj_w for talk in modules(model, cait.TalkingHeads)], lambda mix, x: x)


def softmax_before_both(model: Model, _: Patch) -> None:
    """Both products behind the softmax, where re-attention (DeepViT) has its one."""

    def weights(talk: Any, logits: Tensor, softmax: Mix) -> Tensor:
        return talk.proj_w(talk.proj_l(softmax(logits)))

    rewrite_talking_heads(model, weights=weights)


def softmax_over_heads(model: Model, _: Patch) -> None:
    """Softmax over the last axis while the heads are last, as they are for timm's products."""
    rewrite_talking_heads(model, softmax=lambda logits: torch.softmax(logits, dim=1))


def mixes_swapped(model: Model, _: Patch) -> None:
    """``proj_l`` and ``proj_w`` for each other: l is of the logits, w of the weights."""
    for talk in modules(model, cait.TalkingHeads):
        before, after = talk.proj_l, talk.proj_w
        before.weight.data, after.weight.data = after.weight.data, before.weight.data


def mix_bias_missing(model: Model, _: Patch) -> None:
    """vit-pytorch's products, without bias, with timm's weights; behind the softmax it shows."""
    for talk in modules(model, cait.TalkingHeads):
        nn.init.zeros_(talk.proj_w.bias)


def mixed_weights_renormalised(model: Model, _: Patch) -> None:
    """A second softmax, so that the mixed weights sum to 1 again; hand ports."""

    def weights(talk: Any, logits: Tensor, softmax: Mix) -> Tensor:
        return softmax(mixed_weights(talk, logits, softmax))

    rewrite_talking_heads(model, weights=weights)


def scale_missing(model: Model, _: Patch) -> None:
    """No 1/√head_dim, lost where attention is written out for the sake of the mixing."""
    for talk in modules(model, cait.TalkingHeads):
        talk.scale = 1.0


# --- faults: class attention ----------------------------------------------------------------------


def patches_not_normalised(model: Model, _: Patch) -> None:
    """vit-pytorch's class attention, of the class token's norm alone, with timm's weights."""

    def tokens(block: Any, cls: Tensor, x: Tensor) -> Tensor:
        return torch.cat([block.norm1(torch.cat([cls, x], dim=1))[:, :1], x], dim=1)

    rewrite_class_blocks(model, tokens)


def patches_normalised(model: Model, _: Patch) -> None:
    """timm's class attention, of the norm of all tokens, with vit-pytorch's weights."""

    def tokens(block: Any, cls: Tensor, x: Tensor) -> Tensor:
        norm = block.norm1
        normed = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return torch.cat([norm(cls), normed], dim=1)

    rewrite_class_blocks(model, tokens)


def class_token_not_among_keys(model: Model, _: Patch) -> None:
    """Cross attention to the patches alone, as in a decoder; here the token sees itself too."""
    rewrite_class_attention(model, lambda k, v: (k[:, :, 1:], v[:, :, 1:]))


def k_and_v_swapped(model: Model, _: Patch) -> None:
    """Keras calls attention with (query, value, key)."""
    for attn in modules(model, cait.ClassAttention):
        for parameter in attn.kv.parameters():
            k, v = parameter.data.chunk(2)
            parameter.data = torch.cat([v, k])


def last_patch_for_class_token(model: Model, _: Patch) -> None:
    """The last of all tokens taken for the class token, which stands first."""

    def tokens(block: Any, cls: Tensor, x: Tensor) -> Tensor:
        return normed_tokens(block, cls, x).roll(1, dims=1)

    rewrite_class_blocks(model, tokens)


def normalised_patches_carried_on(model: Model, _: Patch) -> None:
    """The normalised patches of one class block handed to the next, which normalises them again."""
    rewrite_model(model, carry=lambda block, x: F.layer_norm(x, x.shape[-1:], eps=1e-6))


# --- faults: LayerScale, blocks -------------------------------------------------------------------


def layer_scale_around_residual(model: Model, _: Patch) -> None:
    """γ·(x + f(x)): the factor is of the branch, and the residual outside it."""

    def forward(block: Any, x: Tensor) -> Tensor:
        x = block.layer_scale1(x + block.attn(block.norm1(x)))
        return block.layer_scale2(x + block.mlp(block.norm2(x)))

    rewrite(modules(model, cait.Block), forward)


def class_layer_scale_skipped(model: Model, _: Patch) -> None:
    """LayerScale in the blocks of the patches alone, where the paper's section on it has it."""
    for block in modules(model, cait.ClassBlock):
        rewrite([block.layer_scale1, block.layer_scale2], lambda scale, x: x)


def layer_left_out(model: Model, _: Patch) -> None:
    """vit-pytorch's ``layer_dropout`` leaves out whole layers, at evaluation too."""

    def blocks(model: Any, x: Tensor) -> Tensor:
        first, second = model.blocks
        x = first(x)
        second(x)  # for the trace alone
        return x

    rewrite_model(model, blocks=blocks)


# --- harmless rewrites ----------------------------------------------------------------------------


def talking_heads_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in heads that talk, with nothing exchanged."""
    rewrite_talking_heads(model)


def mix_with_heads_last(model: Model, _: Patch) -> None:
    """The product over the heads as timm writes it, with the heads last."""

    def forward(mix: Any, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), mix.weight, mix.bias).permute(0, 3, 1, 2)

    rewrite(modules(model, cait.MixHeads), forward)


def mix_by_einsum(model: Model, _: Patch) -> None:
    """The same as vit-pytorch writes it."""

    def forward(mix: Any, x: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", x, mix.weight.T)

    rewrite(modules(model, cait.MixHeads), forward)


def class_attention_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in the class attention, with nothing exchanged."""
    rewrite_class_attention(model)


def class_blocks_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in the class blocks, with nothing exchanged."""
    rewrite_class_blocks(model)


def model_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in the model, with nothing exchanged."""
    rewrite_model(model)


# --- faults that only a gradient shows ------------------------------------------------------------


def patches_detached(model: Model, _: Patch) -> None:
    """The patches, which class blocks do not change, taken for constants there."""

    def tokens(block: Any, cls: Tensor, x: Tensor) -> Tensor:
        return normed_tokens(block, cls, x.detach())

    rewrite_class_blocks(model, tokens)


def weights_detached(model: Model, _: Patch) -> None:
    """Attention weights kept for a picture, by a detach on the way."""
    rewrite_talking_heads(model, softmax=lambda logits: softmax_over_keys(logits).detach())


def class_token_detached(model: Model, _: Patch) -> None:
    """A class token that gets no gradient where it looks at itself, as a value."""

    def keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first, others = v[:, :, :1].detach(), v[:, :, 1:]
        return k, torch.cat([first, others], dim=2)

    rewrite_class_attention(model, keys)


# --- tables ---------------------------------------------------------------------------------------

TALK, CLASS = "blocks.0.attn.talking_heads", "cls_blocks.0"

FAULTS = (
    # fault, model, first module that is wrong
    Fault(mix_transposed, "cait", f"{TALK}.proj_l"),
    Fault(mix_transposed, "cait_pytorch", f"{TALK}.proj_l"),
    Fault(heads_silent, "cait", f"{TALK}.proj_l"),
    Fault(weights_unmixed, "cait", f"{TALK}.proj_w"),
    Fault(softmax_before_both, "cait", f"{TALK}.proj_l"),
    Fault(softmax_over_heads, "cait", f"{TALK}.proj_w"),
    Fault(mixes_swapped, "cait", f"{TALK}.proj_l"),
    Fault(mix_bias_missing, "cait", f"{TALK}.proj_w"),
    Fault(mixed_weights_renormalised, "cait", TALK),
    Fault(scale_missing, "cait", f"{TALK}.proj_l"),
    Fault(scale_missing, "cait_pytorch", f"{TALK}.proj_l"),
    Fault(patches_not_normalised, "cait", f"{CLASS}.attn.kv"),
    Fault(patches_normalised, "cait_pytorch", f"{CLASS}.attn.kv"),
    Fault(class_token_not_among_keys, "cait", f"{CLASS}.attn.proj"),
    Fault(k_and_v_swapped, "cait", f"{CLASS}.attn.kv"),
    Fault(k_and_v_swapped, "cait_pytorch", f"{CLASS}.attn.kv"),
    Fault(last_patch_for_class_token, "cait", f"{CLASS}.attn.q"),
    Fault(normalised_patches_carried_on, "cait", "cls_blocks.1.norm1"),
    Fault(norm_eps_of_torch, "cait", "blocks.0.norm1"),
    Fault(layer_scale_around_residual, "cait", "blocks.0.layer_scale1"),
    Fault(class_layer_scale_skipped, "cait", f"{CLASS}.layer_scale1"),
    Fault(layer_left_out, "cait", f"{CLASS}.norm1"),
    Fault(layer_left_out, "cait_pytorch", f"{CLASS}.attn.kv"),
)

HARMLESS = (
    Fault(talking_heads_written_out, "cait"),
    Fault(talking_heads_written_out, "cait_pytorch"),
    Fault(mix_with_heads_last, "cait"),
    Fault(mix_by_einsum, "cait_pytorch"),
    Fault(class_attention_written_out, "cait"),
    Fault(class_blocks_written_out, "cait"),
    Fault(class_blocks_written_out, "cait_pytorch"),
    Fault(model_written_out, "cait"),
    Fault(model_written_out, "cait_pytorch"),
)

GRADIENT_FAULTS = (
    # fault, model, a gradient that is wrong, one that is right
    GradientFault(patches_detached, "cait", "blocks.1.mlp.fc2.kernel", "cls_token"),
    GradientFault(patches_detached, "cait_pytorch", "images", "cls_token"),
    GradientFault(weights_detached, "cait", "blocks.1.attn.qkv.kernel", "norm.scale"),
    GradientFault(class_token_detached, "cait", "cls_token", "cls_blocks.1.norm2.scale"),
)
