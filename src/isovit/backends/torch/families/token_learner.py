"""TokenLearner in PyTorch.

Source: Ryoo et al. 2021, arXiv:2106.11297; the official code and the example of keras.io (both
Apache-2.0); see the spec for the differences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.families.vit import ConvPatchEmbed
from isovit.backends.torch.layers import ACTIVATIONS, Block, Conv, Linear, Mlp
from isovit.spec.families.token_learner import CONV_KERNEL, CONVS, TokenLearnerConfig


def fix_bias(layer: Linear) -> None:
    """Leave the bias of a product out of training."""
    layer.bias.requires_grad_(False)


class ActivatedMlp(Mlp):
    """Dense, activation, dense, activation: of the Keras example."""

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.activation(self.fc2(x)))


class TokenMask(nn.Module):
    """Dense, activation, dense: at each place a number for each learned token."""

    def __init__(self, config: TokenLearnerConfig, *, bias_trains: bool) -> None:
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.bottleneck_dim, bias=True)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout1 = nn.Dropout(config.dropout_rate)
        self.fc2 = Linear(config.bottleneck_dim, config.learned_tokens, bias=True)
        if not bias_trains:  # a softmax behind takes it away again
            fix_bias(self.fc2)
        self.dropout2 = nn.Dropout(config.dropout_rate)

    def forward(self, x: Float[Tensor, "batch places dim"]) -> Float[Tensor, "batch places tokens"]:
        x = self.dropout1(self.activation(self.fc1(x)))
        return self.dropout2(self.fc2(x))


class ConvLearner(nn.Module):
    """TokenLearner v1: maps by convolutions, each number between 0 and 1.

    The maps are made of normalised tokens and weigh the tokens themselves.
    """

    def __init__(self, config: TokenLearnerConfig) -> None:
        super().__init__()
        dim, tokens = config.embed_dim, config.learned_tokens
        self.grid, self.pool = config.grid, config.learner_pool
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.convs = nn.ModuleList(
            Conv(
                tokens if i else dim,
                tokens,
                CONV_KERNEL,
                stride=1,
                padding=CONV_KERNEL // 2,
                bias=False,
            )
            for i in range(CONVS)
        )
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Float[Tensor, "batch places dim"]) -> Float[Tensor, "batch tokens dim"]:
        maps = self.norm(x).unflatten(1, self.grid)  # (batch, rows, columns, dim)
        for i, conv in enumerate(self.convs):
            maps = conv(self.activation(maps) if i else maps)  # (batch, rows, columns, tokens)
        maps = torch.sigmoid(maps).flatten(1, 2).mT  # (batch, tokens, places)
        y = maps @ x
        return y if self.pool == "sum" else y / x.shape[1]


class MlpLearner(nn.Module):
    """TokenLearner v1.1: maps by an MLP, each a softmax over the grid.

    The maps are made of normalised tokens and weigh the tokens themselves.
    """

    def __init__(self, config: TokenLearnerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mask = TokenMask(config, bias_trains=False)

    def forward(self, x: Float[Tensor, "batch places dim"]) -> Float[Tensor, "batch tokens dim"]:
        maps = self.mask(self.norm(x)).mT  # (batch, tokens, places)
        return torch.softmax(maps, dim=-1) @ x


class TokenFuser(nn.Module):
    """Learned tokens back onto the grid: they mix, then each place takes of each."""

    def __init__(self, config: TokenLearnerConfig) -> None:
        super().__init__()
        dim, tokens, eps = config.embed_dim, config.learned_tokens, config.norm_eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mix = Linear(tokens, tokens, bias=True)
        fix_bias(self.mix)  # norm2 takes it away again
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mask = TokenMask(config, bias_trains=True)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, y: Float[Tensor, "batch tokens dim"], x: Float[Tensor, "batch places dim"]
    ) -> Float[Tensor, "batch places dim"]:
        y = self.mix(self.norm1(y).mT).mT  # over the tokens, for each channel by itself
        maps = torch.sigmoid(self.mask(self.norm(x)))  # (batch, places, tokens)
        return self.dropout(maps @ self.norm2(y))


LEARNERS = {"conv": ConvLearner, "mlp": MlpLearner}


class TokenLearner(nn.Module):
    """Vision Transformer that goes on with learned tokens.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: TokenLearnerConfig) -> None:
        super().__init__()
        self.config = config
        dim, classes, rate = config.embed_dim, config.num_classes, config.dropout_rate
        self.patch_embed = ConvPatchEmbed(config.stem)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, dim))
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        mlp = ActivatedMlp if config.mlp_output_activation else Mlp
        self.blocks = nn.ModuleList(
            Block(config.block, mlp=mlp(dim, config.mlp_dim, config.activation, rate))
            for _ in range(config.depth)
        )
        self.learners = nn.ModuleList(
            LEARNERS[config.learner](config) for _ in range(config.num_learners)
        )
        self.fusers = nn.ModuleList(TokenFuser(config) for _ in range(config.num_fusers))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = Linear(dim, classes, bias=True) if classes else nn.Identity()

    def forward_tokens(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the blocks: learned ones, or with a fuser those of the grid."""
        self.config.check_images(images.shape)
        x = self.dropout(self.patch_embed(images) + self.pos_embed)  # (batch, patches, dim)
        blocks = list(self.blocks)
        for block in blocks[: self.config.learner_loc]:
            x = block(x)
        last = blocks[self.config.learner_loc :]
        if self.config.fuser:
            for learner, block, fuser in zip(self.learners, last, self.fusers, strict=True):
                x = x + fuser(block(learner(x)), x)
            return x
        for learner in self.learners:  # one, or none
            x = learner(x)  # (batch, learned tokens, dim)
        for block in last:
            x = block(x)
        return x

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch features"]:
        return self.head(self.norm(self.forward_tokens(images)).mean(dim=1))
