"""Faults of ports of TokenLearner, planted into the PyTorch model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isovit.backends.torch.families import token_learner
from isovit.backends.torch.layers import ACTIVATIONS, Attention, Mlp
from isovit.spec.families.token_learner import TokenLearnerConfig
from parity_tests.controls.blocks import (
    attention_written_out,
    loss_averaged,
    norm_eps_of_keras,
    norm_eps_of_torch,
    scale_by_embed_dim,
    statistics_detached,
    two_pass_variance,
)
from parity_tests.controls.faults import Fault, GradientFault, Model, Patch, modules, rewrite

V11 = TokenLearnerConfig(
    image_size=(8, 12), patch_size=(4, 4), embed_dim=18, depth=3, num_heads=3, mlp_dim=30,
    learner_loc=1, learned_tokens=4, bottleneck_dim=8, num_classes=5,
)  # fmt: skip

CASES: dict[str, Any] = {
    "token_learner": V11,
    "token_learner_v1": V11.replace(learner="conv"),
    "token_learner_fuser": V11.replace(fuser=True),
    "token_learner_mini": V11.replace(
        learner="conv", learner_pool="mean", head_dim=18, mlp_output_activation=True
    ),
}


# --- scaffolds: a forward with one exchangeable part ----------------------------------------------


def softmax_over_places(scores: Tensor) -> Tensor:
    """The sound maps of v1.1, of (batch, places, tokens)."""
    return scores.softmax(dim=1)


def as_they_came(_: Any, x: Tensor) -> Tensor:
    """The sound tokens that maps weigh."""
    return x


def rewrite_mlp_learners(
    model: Model,
    *,
    maps: Callable[[Tensor], Tensor] = softmax_over_places,
    weighed: Callable[[Any, Tensor], Tensor] = as_they_came,
) -> None:
    """Give all TokenLearners of v1.1 a forward, by einsum, with one part exchanged."""

    def forward(learner: Any, x: Tensor) -> Tensor:
        found = maps(learner.mask(learner.norm(x)))
        return torch.einsum("bpt,bpd->btd", found, weighed(learner, x))

    rewrite(modules(model, token_learner.MlpLearner), forward)


def row_by_row(learner: Any, x: Tensor) -> Tensor:
    """The sound grid of (batch, places, dim)."""
    return x.unflatten(1, learner.grid)


def places_of(x: Tensor) -> Tensor:
    """The sound places of a grid."""
    return x.flatten(1, 2)


def rewrite_conv_learners(
    model: Model,
    *,
    grid: Callable[[Any, Tensor], Tensor] = row_by_row,
    places: Callable[[Tensor], Tensor] = places_of,
    maps: Callable[[Tensor], Tensor] = torch.sigmoid,
    weighed: Callable[[Any, Tensor], Tensor] = as_they_came,
) -> None:
    """Give all TokenLearners of v1 a forward, by products and sums, with one part exchanged."""

    def forward(learner: Any, x: Tensor) -> Tensor:
        image = grid(learner, learner.norm(x))
        for i, conv in enumerate(learner.convs):
            image = conv(learner.activation(image) if i else image)
        found = maps(places(image))
        y = found[:, :, :, None] * weighed(learner, x)[:, :, None]  # (batch, places, tokens, dim)
        return y.mean(dim=1) if learner.pool == "mean" else y.sum(dim=1)

    rewrite(modules(model, token_learner.ConvLearner), forward)


def rewrite_fusers(model: Model, shares: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
    """Give all TokenFusers a forward, by einsum, with other shares of (batch, places, tokens)."""

    def forward(fuser: Any, y: Tensor, x: Tensor) -> Tensor:
        y = fuser.mix(fuser.norm1(y).permute(0, 2, 1)).permute(0, 2, 1)
        return torch.einsum("bpt,btd->bpd", shares(fuser.mask(fuser.norm(x))), fuser.norm2(y))

    rewrite(modules(model, token_learner.TokenFuser), forward)


def rewrite_fused_blocks(model: Model, residual: Callable[[Tensor], Tensor]) -> None:
    """Give a model with fusers other residuals around them."""

    def forward_tokens(model: Any, images: Tensor) -> Tensor:
        x = model.patch_embed(images) + model.pos_embed
        loc = model.config.learner_loc
        for block in model.blocks[:loc]:
            x = block(x)
        for learner, block, fuser in zip(
            model.learners, model.blocks[loc:], model.fusers, strict=True
        ):
            x = residual(x) + fuser(block(learner(x)), x)
        return x

    def forward(model: Any, images: Tensor) -> Tensor:
        return model.head(model.norm(forward_tokens(model, images)).mean(dim=1))

    rewrite([model], forward)


# --- faults: what is weighed, and by what ---------------------------------------------------------


def normalised_tokens_weighed(model: Model, _: Patch) -> None:
    """``x = norm(x)`` at the start: what the maps weigh is then normalised, too; hand ports."""
    rewrite_mlp_learners(model, weighed=lambda learner, x: learner.norm(x))
    rewrite_conv_learners(model, weighed=lambda learner, x: learner.norm(x))


def sigmoid_for_softmax(model: Model, _: Patch) -> None:
    """v1.1 with the maps of v1, the form of the paper."""
    rewrite_mlp_learners(model, maps=torch.sigmoid)


def softmax_for_sigmoid(model: Model, _: Patch) -> None:
    """v1 with the maps of v1.1."""
    rewrite_conv_learners(model, maps=softmax_over_places)


def softmax_over_tokens(model: Model, _: Patch) -> None:
    """Softmax over the last axis before the transpose: each place then gives itself once."""
    rewrite_mlp_learners(model, maps=lambda scores: scores.softmax(dim=2))


def mean_for_sum(model: Model, _: Patch) -> None:
    """Official weights in the Keras example's code: ``use_sum_pooling`` is True by default."""
    for learner in modules(model, token_learner.ConvLearner):
        learner.pool = "mean"


def sum_for_mean(model: Model, _: Patch) -> None:
    """The Keras example's weights in the official code."""
    for learner in modules(model, token_learner.ConvLearner):
        learner.pool = "sum"


def learner_without_norm(model: Model, _: Patch) -> None:
    """Maps made of the tokens as they came; hand ports."""
    for learner in model.learners:
        learner.norm = nn.Identity()


# --- faults: convolutions -------------------------------------------------------------------------


def last_convolution_activated(model: Model, _: Patch) -> None:
    """GELU behind all four convolutions, and not behind three: sigmoid(gelu(x)) is 0.46 or more."""
    rewrite_conv_learners(model, maps=lambda x: torch.sigmoid(ACTIVATIONS["gelu_tanh"](x)))


def grid_by_column(model: Model, _: Patch) -> None:
    """Tokens laid out as (width, height), as sizes come from Pillow."""

    def grid(learner: Any, x: Tensor) -> Tensor:
        return x.unflatten(1, learner.grid[::-1]).transpose(1, 2)

    rewrite_conv_learners(model, grid=grid, places=lambda x: x.transpose(1, 2).flatten(1, 2))


def conv_kernels_turned(model: Model, _: Patch) -> None:
    """``kernel.T`` of (h, w, in, out) is (out, in, w, h): height and width are exchanged."""
    for learner in model.learners:
        for conv in learner.convs:
            conv.weight.data = conv.weight.data.mT.contiguous()


def repeated_at_the_border(model: Model, _: Patch) -> None:
    """The border repeated for the zeros of SAME: ``padding_mode="replicate"``; hand ports."""
    for learner in model.learners:
        for conv in learner.convs:
            conv.padding_mode = "replicate"
            conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


# --- faults: where the learner stands -------------------------------------------------------------


def learner_one_block_early(model: Model, _: Patch) -> None:
    """Behind the block of index 1, as in the Keras example, taken for before that block."""
    model.config = model.config.replace(learner_loc=model.config.learner_loc - 1)


def learner_one_block_late(model: Model, _: Patch) -> None:
    """Before the block of index 1, as in the official code, taken for behind that block."""
    model.config = model.config.replace(learner_loc=model.config.learner_loc + 1)


# --- faults: MLP and attention --------------------------------------------------------------------


def gelu_exact(model: Model, _: Patch) -> None:
    """``nn.GELU()`` for ``flax.linen.gelu`` and ``keras.ops.gelu``, which approximate."""
    for mlp in modules(model, Mlp):
        mlp.activation = ACTIVATIONS["gelu"]


def gelu_of_the_maps_exact(model: Model, _: Patch) -> None:
    """The same in the maps alone."""
    for module in model.modules():
        if isinstance(module, token_learner.TokenMask | token_learner.ConvLearner):
            module.activation = ACTIVATIONS["gelu"]


def second_activation_missing(model: Model, _: Patch) -> None:
    """The usual MLP in the Keras example, whose loop over units activates every product."""
    rewrite(modules(model, token_learner.ActivatedMlp), Mlp.forward)


def second_activation_added(model: Model, _: Patch) -> None:
    """The Keras example's MLP around official weights."""
    rewrite(modules(model, Mlp), token_learner.ActivatedMlp.forward)


def key_dim_divided_by_heads(model: Model, _: Patch) -> None:
    """Heads taken to be embed_dim / num_heads wide: as many numbers, so there are more of them."""
    for attn in modules(model, Attention):
        head_dim = model.config.embed_dim // attn.num_heads
        attn.num_heads = attn.proj.in_features // head_dim
        attn.scale = head_dim**-0.5


def scale_of_the_divided_width(model: Model, _: Patch) -> None:
    """The right heads, with the scale of heads that fill the width."""
    for attn in modules(model, Attention):
        attn.scale = (model.config.embed_dim // attn.num_heads) ** -0.5


# --- faults: fuser, pooling -----------------------------------------------------------------------


def fuser_without_residual(model: Model, _: Patch) -> None:
    """What the fuser gives in place of the grid: the learned tokens alone go on; hand ports."""
    rewrite_fused_blocks(model, residual=torch.zeros_like)


def fuser_softmax(model: Model, _: Patch) -> None:
    """Softmax over the learned tokens, as an attention has it, for the sigmoid."""
    rewrite_fusers(model, shares=lambda scores: scores.softmax(dim=2))


def fuser_mixture_transposed(model: Model, _: Patch) -> None:
    """A square Flax kernel over the tokens copied as it is: no shape protests."""
    for fuser in model.fusers:
        fuser.mix.weight.data = fuser.mix.weight.data.T.contiguous()


def fuser_without_its_first_norm(model: Model, _: Patch) -> None:
    """``use_normalization=False``, which is not the default."""
    for fuser in model.fusers:
        fuser.norm1 = nn.Identity()


def fuser_without_its_second_norm(model: Model, _: Patch) -> None:
    """The norm behind the mixture left out; hand ports."""
    for fuser in model.fusers:
        fuser.norm2 = nn.Identity()


def first_learner_for_all(model: Model, _: Patch) -> None:
    """One TokenLearner for every block; the official code makes one for each."""
    for learner in list(model.learners)[1:]:
        learner.load_state_dict(model.learners[0].state_dict())


def norm_of_the_mean(model: Model, _: Patch) -> None:
    """The final norm behind the pooling: timm's ``fc_norm``."""

    def forward(model: Any, images: Tensor) -> Tensor:
        return model.head(model.norm(model.forward_tokens(images).mean(dim=1)))

    rewrite([model], forward)


# --- harmless rewrites ----------------------------------------------------------------------------


def learners_written_out(model: Model, _: Patch) -> None:
    """The scaffolds of the faults in both kinds of TokenLearner, with nothing exchanged."""
    rewrite_mlp_learners(model)
    rewrite_conv_learners(model)


def sigmoid_by_tanh(model: Model, _: Patch) -> None:
    """(1 + tanh(x/2)) / 2, the same function."""
    rewrite_conv_learners(model, maps=lambda x: (1 + torch.tanh(x / 2)) / 2)


def fusers_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults in TokenFusers, with nothing exchanged."""
    rewrite_fusers(model)


def fused_blocks_written_out(model: Model, _: Patch) -> None:
    """The scaffold of the faults around TokenFusers, with nothing exchanged."""
    rewrite_fused_blocks(model, residual=lambda x: x)


def gelu_by_tanh(model: Model, _: Patch) -> None:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), the definition."""
    for mlp in modules(model, Mlp):
        mlp.activation = lambda x: (
            x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        )


# --- faults that only a gradient shows ------------------------------------------------------------


def maps_fixed(model: Model, _: Patch) -> None:
    """Maps that get no gradient: attention taken out of a model for a picture, with ``detach``."""
    rewrite_mlp_learners(model, maps=lambda scores: softmax_over_places(scores).detach())


def residual_fixed(model: Model, _: Patch) -> None:
    """A residual kept for later with ``detach``."""
    rewrite_fused_blocks(model, residual=torch.Tensor.detach)


# --- tables ---------------------------------------------------------------------------------------

FIRST, LEARNER, FUSER = "blocks.0", "learners.0", "fusers.0"

FAULTS = (
    Fault(normalised_tokens_weighed, "token_learner", LEARNER),
    Fault(normalised_tokens_weighed, "token_learner_v1", LEARNER),
    Fault(normalised_tokens_weighed, "token_learner_mini", LEARNER),
    Fault(sigmoid_for_softmax, "token_learner", LEARNER),
    Fault(softmax_for_sigmoid, "token_learner_v1", LEARNER),
    Fault(softmax_over_tokens, "token_learner", LEARNER),
    Fault(mean_for_sum, "token_learner_v1", LEARNER),
    Fault(sum_for_mean, "token_learner_mini", LEARNER),
    Fault(learner_without_norm, "token_learner", f"{LEARNER}.norm"),
    Fault(last_convolution_activated, "token_learner_v1", LEARNER),
    Fault(grid_by_column, "token_learner_v1", f"{LEARNER}.convs.0"),
    Fault(conv_kernels_turned, "token_learner_v1", f"{LEARNER}.convs.0"),
    Fault(repeated_at_the_border, "token_learner_v1", f"{LEARNER}.convs.0"),
    Fault(learner_one_block_early, "token_learner", f"{FIRST}.norm1"),
    Fault(learner_one_block_late, "token_learner", f"{LEARNER}.norm"),
    Fault(learner_one_block_late, "token_learner_mini", f"{LEARNER}.norm"),
    Fault(gelu_exact, "token_learner", f"{FIRST}.mlp.fc2"),
    Fault(gelu_exact, "token_learner_mini", f"{FIRST}.mlp.fc2"),
    Fault(gelu_of_the_maps_exact, "token_learner", f"{LEARNER}.mask.fc2"),
    Fault(gelu_of_the_maps_exact, "token_learner_v1", f"{LEARNER}.convs.1"),
    Fault(second_activation_missing, "token_learner_mini", f"{FIRST}.mlp"),
    Fault(second_activation_added, "token_learner", f"{FIRST}.mlp"),
    Fault(key_dim_divided_by_heads, "token_learner_mini", f"{FIRST}.attn.proj"),
    Fault(scale_of_the_divided_width, "token_learner_mini", f"{FIRST}.attn.proj"),
    Fault(scale_by_embed_dim, "token_learner", f"{FIRST}.attn.proj"),
    Fault(fuser_without_residual, "token_learner_fuser", "learners.1.norm"),
    Fault(fuser_softmax, "token_learner_fuser", FUSER),
    Fault(fuser_mixture_transposed, "token_learner_fuser", f"{FUSER}.mix"),
    Fault(fuser_without_its_first_norm, "token_learner_fuser", f"{FUSER}.norm1"),
    Fault(fuser_without_its_second_norm, "token_learner_fuser", f"{FUSER}.norm2"),
    Fault(first_learner_for_all, "token_learner_fuser", "learners.1.norm"),
    Fault(norm_of_the_mean, "token_learner", "norm"),
    Fault(norm_eps_of_torch, "token_learner", f"{FIRST}.norm1"),
    Fault(norm_eps_of_keras, "token_learner_mini", f"{FIRST}.norm1"),
)


HARMLESS = (
    Fault(learners_written_out, "token_learner"),
    Fault(learners_written_out, "token_learner_v1"),
    Fault(learners_written_out, "token_learner_mini"),
    Fault(sigmoid_by_tanh, "token_learner_v1"),
    Fault(fusers_written_out, "token_learner_fuser"),
    Fault(fused_blocks_written_out, "token_learner_fuser"),
    Fault(attention_written_out, "token_learner_mini"),
    Fault(gelu_by_tanh, "token_learner_mini"),
    Fault(two_pass_variance, "token_learner"),
)


GRADIENT_FAULTS = (
    GradientFault(maps_fixed, "token_learner", f"{LEARNER}.mask.fc2.kernel", "norm.scale"),
    GradientFault(residual_fixed, "token_learner_fuser", "pos_embed", "norm.scale"),
    GradientFault(statistics_detached, "token_learner", f"{FIRST}.mlp.fc2.kernel", "norm.scale"),
    GradientFault(loss_averaged, "token_learner", "images", None),
)
