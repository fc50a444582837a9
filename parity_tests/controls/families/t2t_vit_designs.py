"""Faults of ports of T2T-ViT's designs of convolutional networks; the stem's are T2T-ViT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isovit.backends.torch.families import t2t_vit_designs
from isovit.backends.torch.layers import ACTIVATIONS, Attention
from isovit.spec.families.t2t_vit import YITU, SoftSplit
from isovit.spec.families.t2t_vit_designs import T2TViTDesignsConfig
from parity_tests.controls.blocks import (
    attention_written_out,
    gelu_by_erf,
    gelu_tanh,
    loss_averaged,
    merge_by_head,
    norm_eps_of_flax,
    softmax_over_keys,
    two_pass_variance,
)
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

SE = T2TViTDesignsConfig(
    image_size=(20, 28), t2t_layers=(SoftSplit(3, 2, 1), SoftSplit(3, 2, 1)), token_dim=10,
    token_mlp_dim=14, performer_features=6, embed_dim=24, depth=2, num_heads=4, mlp_dim=30,
    num_classes=5, design="se", se_dim=8, **YITU,
)  # fmt: skip

CASES: dict[str, Any] = {
    "t2t_se": SE,
    "t2t_ghost": SE.replace(design="ghost", mlp_dim=72),
    # Blocks of 24 and 40 channels, a transition from 56 to 28, a block of 28.
    "t2t_dense": SE.replace(design="dense", depth=3, dense_depths=(2, 1), dense_growth=16),
}

# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def mean_over_tokens(x: Tensor) -> Tensor:
    """The sound squeeze."""
    return x.mean(dim=1)


def rewrite_excitation(
    model: Model,
    *,
    squeeze: Callable[[Tensor], Tensor] = mean_over_tokens,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    share: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> None:
    """Give all squeeze-and-excitations a forward with one part exchanged."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        shares = share(layer.fc2(activation(layer.fc1(squeeze(x)))))
        return torch.einsum("btc,bc->btc", x, shares)

    rewrite(modules(model, t2t_vit_designs.SqueezeExcite), forward)


def weighed_behind_the_projection(attn: Any, x: Tensor) -> Tensor:
    """The sound end of an attention whose channels are weighed."""
    return attn.se_layer(attn.proj(x))


def rewrite_se_attention(
    model: Model, end: Callable[[Any, Tensor], Tensor] = weighed_behind_the_projection
) -> None:
    """Give all attentions with squeeze-and-excitation another end."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return end(attn, merge_by_head(softmax_over_keys(q @ k.mT * attn.scale) @ v))

    rewrite(modules(model, t2t_vit_designs.SEAttention), forward)


def copies_behind(made: Tensor, copied: Tensor, num_heads: int) -> Tensor:
    """The sound heads of q, k or v: of all that is made, then of all copies."""
    return torch.cat([made, copied], dim=-1).unflatten(-1, (num_heads, -1))


def rewrite_ghost_attention(
    model: Model, heads: Callable[[Tensor, Tensor, int], Tensor] = copies_behind
) -> None:
    """Give all ghost attentions other heads, (batch, tokens, heads, width), of what is made."""

    def forward(attn: Any, x: Tensor) -> Tensor:
        made = attn.qkv(x)
        parts = zip(made.chunk(3, dim=-1), attn.cheap(made).chunk(3, dim=-1), strict=True)
        q, k, v = (heads(*part, attn.num_heads).transpose(1, 2) for part in parts)
        return attn.proj(merge_by_head(softmax_over_keys(q @ k.mT * attn.scale) @ v))

    rewrite(modules(model, t2t_vit_designs.GhostAttention), forward)


def copies_activated(mlp: Any, hidden: Tensor) -> list[Tensor]:
    """The sound parts of a ghost's hidden layer, of what comes before its activation."""
    made = mlp.activation(hidden)
    return [made, *(mlp.activation(cheap(made)) for cheap in mlp.cheap)]


def rewrite_ghost_mlp(
    model: Model, parts: Callable[[Any, Tensor], list[Tensor]] = copies_activated
) -> None:
    """Give all ghost MLPs a hidden layer of other parts."""

    def forward(mlp: Any, x: Tensor) -> Tensor:
        return mlp.fc2(torch.cat(parts(mlp, mlp.fc1(x)), dim=-1))

    rewrite(modules(model, t2t_vit_designs.GhostMlp), forward)


def new_channels_behind(x: Tensor, _: Tensor, new: Tensor) -> Tensor:
    """The sound output of a dense block, of (input, output of the plain block, new channels)."""
    return torch.cat([x, new], dim=-1)


def rewrite_dense_blocks(
    model: Model, join: Callable[[Tensor, Tensor, Tensor], Tensor] = new_channels_behind
) -> None:
    """Give all dense blocks another output."""

    def forward(block: Any, x: Tensor) -> Tensor:
        y = x + block.attn(block.norm1(x))
        y = y + block.mlp(block.norm2(y))
        return join(x, y, block.dense_linear(y))

    rewrite(modules(model, t2t_vit_designs.DenseBlock), forward)


# --- faults: squeeze and excitation ---------------------------------------------------------------


def squeezed_without_class_token(model: Model, _: Patch) -> None:
    """The mean over the patches alone, as over the pixels of a convolutional network."""
    rewrite_excitation(model, squeeze=lambda x: x[:, 1:].mean(dim=1))


def squeezed_to_the_maximum(model: Model, _: Patch) -> None:
    """Pooling by the maximum, as CBAM has beside the mean."""
    rewrite_excitation(model, squeeze=lambda x: x.amax(dim=1))


def excited_by_gelu(model: Model, _: Patch) -> None:
    """The activation of the MLP for the ReLU of the original."""
    rewrite_excitation(model, activation=F.gelu)


def excited_by_hard_sigmoid(model: Model, _: Patch) -> None:
    """relu6(x + 3) / 6, of MobileNetV3 and of GhostNet's own SE."""
    rewrite_excitation(model, share=F.hardsigmoid)


def excited_by_softmax(model: Model, _: Patch) -> None:
    """Shares of the channels that sum to 1; hand ports."""
    rewrite_excitation(model, share=lambda x: x.softmax(dim=-1))


def weighed_before_the_projection(model: Model, _: Patch) -> None:
    """The channels of the heads weighed, which are as many; hand ports."""
    rewrite_se_attention(model, end=lambda attn, x: attn.proj(attn.se_layer(x)))


# --- faults: ghosts -------------------------------------------------------------------------------


def copies_beside_their_channels(model: Model, _: Patch) -> None:
    """Each copy beside its channel: ``stack`` and a reshape for ``cat``."""

    def heads(made: Tensor, copied: Tensor, num_heads: int) -> Tensor:
        return torch.stack([made, copied], dim=-1).flatten(-2).unflatten(-1, (num_heads, -1))

    rewrite_ghost_attention(model, heads)


def copies_within_each_head(model: Model, _: Patch) -> None:
    """Heads of what is made split off first, and copies put behind within each."""

    def heads(made: Tensor, copied: Tensor, num_heads: int) -> Tensor:
        parts = [x.unflatten(-1, (num_heads, -1)) for x in (made, copied)]
        return torch.cat(parts, dim=-1)

    rewrite_ghost_attention(model, heads)


def copies_first(model: Model, _: Patch) -> None:
    """``cat((ghost, x))``, in attention and MLP."""
    rewrite_ghost_attention(model, lambda made, copied, n: copies_behind(copied, made, n))
    rewrite_ghost_mlp(model, lambda mlp, x: copies_activated(mlp, x)[::-1])


def factors_of_k_and_v_swapped(model: Model, _: Patch) -> None:
    """The kernels of the cheap operations fused in the order q, v, k.

    The order k, q, v would be no fault: copies of q meet copies of k alone, channel by channel, so
    that only the product of their factors counts.
    """
    for attn in modules(model, t2t_vit_designs.GhostAttention):
        q, k, v = attn.cheap.factor.data.chunk(3)
        attn.cheap.factor.data = torch.cat([q, v, k])


def scale_of_what_is_made(model: Model, _: Patch) -> None:
    """A head taken to be as wide as half of the channels over the number of heads."""
    for attn in modules(model, t2t_vit_designs.GhostAttention):
        attn.scale = (attn.qkv.out_features // 3 // attn.num_heads) ** -0.5


def copies_not_activated(model: Model, _: Patch) -> None:
    """Copies as they are, as GhostNet's module can have them (``relu=False``)."""

    def parts(mlp: Any, hidden: Tensor) -> list[Tensor]:
        made = mlp.activation(hidden)
        return [made, *(cheap(made) for cheap in mlp.cheap)]

    rewrite_ghost_mlp(model, parts)


def copies_before_the_activation(model: Model, _: Patch) -> None:
    """One activation of everything: copies of what is not activated yet."""

    def parts(mlp: Any, hidden: Tensor) -> list[Tensor]:
        return [mlp.activation(x) for x in (hidden, *(cheap(hidden) for cheap in mlp.cheap))]

    rewrite_ghost_mlp(model, parts)


def copies_of_copies(model: Model, _: Patch) -> None:
    """The second copy made of the first; the official ones are both of what was made."""

    def parts(mlp: Any, hidden: Tensor) -> list[Tensor]:
        found = [mlp.activation(hidden)]
        for cheap in mlp.cheap:
            found.append(mlp.activation(cheap(found[-1])))
        return found

    rewrite_ghost_mlp(model, parts)


def gelu_tanh_of_ghosts(model: Model, _: Patch) -> None:
    """``jax.nn.gelu`` and ``keras.ops.gelu``, which approximate by default."""
    for mlp in modules(model, t2t_vit_designs.GhostMlp):
        mlp.activation = ACTIVATIONS["gelu_tanh"]


# --- faults: dense connections --------------------------------------------------------------------


def new_channels_first(model: Model, _: Patch) -> None:
    """``cat((new, x))``: the widths are right throughout."""
    rewrite_dense_blocks(model, lambda x, y, new: torch.cat([new, x], dim=-1))


def block_kept_for_its_input(model: Model, _: Patch) -> None:
    """``x = block(x)`` before the concatenation: the new channels stand behind the block's."""
    rewrite_dense_blocks(model, lambda x, y, new: torch.cat([y, new], dim=-1))


def transition_not_activated(model: Model, _: Patch) -> None:
    """A product alone, as the reduction of Swin has none."""
    for transition in modules(model, t2t_vit_designs.Transition):
        transition.activation = lambda x: x


def transition_activates_first(model: Model, _: Patch) -> None:
    """The order of DenseNet: norm, activation, convolution."""

    def forward(transition: Any, x: Tensor) -> Tensor:
        return transition.linear(transition.activation(x))

    rewrite(modules(model, t2t_vit_designs.Transition), forward)


def scale_of_the_first_block(model: Model, _: Patch) -> None:
    """One scale for all blocks, of the width of the first: the heads of the others are wider."""
    config = model.config
    for attn in modules(model, Attention):
        attn.scale = (config.embed_dim // config.num_heads) ** -0.5


# --- harmless rewrites ----------------------------------------------------------------------------


def parts_written_out(model: Model, _: Patch) -> None:
    """The scaffolds of all faults, with nothing exchanged."""
    rewrite_excitation(model)
    rewrite_se_attention(model)
    rewrite_ghost_attention(model)
    rewrite_ghost_mlp(model)
    rewrite_dense_blocks(model)


def sigmoid_by_tanh(model: Model, _: Patch) -> None:
    """(1 + tanh(x/2)) / 2, the same function."""
    rewrite_excitation(model, share=lambda x: (1 + torch.tanh(x / 2)) / 2)


def cheap_operations_by_convolution(model: Model, _: Patch) -> None:
    """A grouped convolution along the tokens, which the official code has."""

    def forward(cheap: Any, x: Tensor) -> Tensor:
        kernel = cheap.factor[:, None, None]
        return F.conv1d(x.mT, kernel, groups=len(kernel)).mT

    rewrite(modules(model, t2t_vit_designs.CheapOperation), forward)


# --- faults that only a gradient shows ------------------------------------------------------------


def shares_fixed(model: Model, _: Patch) -> None:
    """Shares of the channels that get no gradient: ``no_grad`` around the squeeze."""
    rewrite_excitation(model, share=lambda x: torch.sigmoid(x).detach())


def copies_fixed(model: Model, _: Patch) -> None:
    """Copies of a detached tensor: the factors still train."""

    def parts(mlp: Any, hidden: Tensor) -> list[Tensor]:
        made = mlp.activation(hidden)
        return [made, *(mlp.activation(cheap(made.detach())) for cheap in mlp.cheap)]

    rewrite_ghost_mlp(model, parts)


def old_channels_fixed(model: Model, _: Patch) -> None:
    """Channels kept for later with ``detach``, as memory-saving DenseNets keep them."""
    rewrite_dense_blocks(model, lambda x, y, new: torch.cat([x.detach(), new], dim=-1))


# --- tables ---------------------------------------------------------------------------------------

ATTN, MLP = "blocks.0.attn", "blocks.0.mlp"
TRANSITION = "blocks.2"

FAULTS = (
    Fault(squeezed_without_class_token, "t2t_se", f"{ATTN}.se_layer.fc1"),
    Fault(squeezed_to_the_maximum, "t2t_se", f"{ATTN}.se_layer.fc1"),
    Fault(excited_by_gelu, "t2t_se", f"{ATTN}.se_layer.fc2"),
    Fault(excited_by_hard_sigmoid, "t2t_se", f"{ATTN}.se_layer"),
    Fault(excited_by_softmax, "t2t_se", f"{ATTN}.se_layer"),
    Fault(weighed_before_the_projection, "t2t_se", f"{ATTN}.proj"),
    Fault(copies_beside_their_channels, "t2t_ghost", f"{ATTN}.proj"),
    Fault(copies_within_each_head, "t2t_ghost", f"{ATTN}.proj"),
    Fault(copies_first, "t2t_ghost", f"{ATTN}.proj"),
    Fault(factors_of_k_and_v_swapped, "t2t_ghost", f"{ATTN}.cheap"),
    Fault(scale_of_what_is_made, "t2t_ghost", f"{ATTN}.proj"),
    Fault(copies_not_activated, "t2t_ghost", f"{MLP}.fc2"),
    Fault(copies_before_the_activation, "t2t_ghost", f"{MLP}.cheap.0"),
    Fault(copies_of_copies, "t2t_ghost", f"{MLP}.cheap.1"),
    Fault(gelu_tanh_of_ghosts, "t2t_ghost", f"{MLP}.cheap.0"),
    Fault(new_channels_first, "t2t_dense", "blocks.0"),
    Fault(block_kept_for_its_input, "t2t_dense", "blocks.0"),
    Fault(transition_not_activated, "t2t_dense", TRANSITION),
    Fault(transition_activates_first, "t2t_dense", f"{TRANSITION}.linear"),
    Fault(scale_of_the_first_block, "t2t_dense", "blocks.1.attn.proj"),
    Fault(gelu_tanh, "t2t_dense", "tokens_to_token.mixers.0.mlp.fc2"),
    Fault(norm_eps_of_flax, "t2t_se", "tokens_to_token.mixers.0.norm1"),
)


HARMLESS = (
    Fault(parts_written_out, "t2t_se"),
    Fault(parts_written_out, "t2t_ghost"),
    Fault(parts_written_out, "t2t_dense"),
    Fault(sigmoid_by_tanh, "t2t_se"),
    Fault(cheap_operations_by_convolution, "t2t_ghost"),
    Fault(attention_written_out, "t2t_dense"),
    Fault(gelu_by_erf, "t2t_dense"),
    Fault(two_pass_variance, "t2t_dense"),
)


GRADIENT_FAULTS = (
    GradientFault(shares_fixed, "t2t_se", f"{ATTN}.se_layer.fc1.kernel", "norm.scale"),
    GradientFault(copies_fixed, "t2t_ghost", f"{MLP}.fc1.kernel", "norm.scale"),
    GradientFault(old_channels_fixed, "t2t_dense", "cls_token", "norm.scale"),
    GradientFault(loss_averaged, "t2t_se", "images", None),
)
