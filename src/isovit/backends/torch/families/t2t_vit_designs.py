"""T2T-ViT with designs of convolutional networks, in PyTorch.

Source: Yuan et al. 2021, arXiv:2101.11986, section 3.2; the official code (Clear BSD); see the spec
for the differences between the designs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.families.t2t_vit import TokensToToken
from isovit.backends.torch.layers import (
    ACTIVATIONS,
    Block,
    Linear,
    attention,
    pool,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.t2t_vit_designs import Halving, T2TViTDesignsConfig
from isovit.spec.positions import sinusoidal_positions


class SqueezeExcite(nn.Module):
    """Each channel by a number from the mean over all tokens; arXiv:1709.01507, eq. 2 to 4."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, bias=False)
        self.fc2 = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        y = torch.relu(self.fc1(x.mean(dim=1)))  # (batch, hidden)
        y = torch.sigmoid(self.fc2(y))  # (batch, dim)
        return x * y[:, None]


class SEAttention(nn.Module):
    """Multi-head self-attention whose channels are weighed behind the projection."""

    def __init__(self, config: BlockConfig, se_dim: int) -> None:
        super().__init__()
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.qkv = Linear(config.dim, 3 * config.inner_dim, bias=config.qkv_bias)
        self.attn_dropout = nn.Dropout(config.attn_dropout_rate)
        self.proj = Linear(config.inner_dim, config.dim, bias=True) if config.attn_proj else None
        self.se_layer = SqueezeExcite(config.dim, se_dim)
        self.proj_dropout = nn.Dropout(config.dropout_rate if config.attn_proj else 0.0)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(self.se_layer(x))


class CheapOperation(nn.Module):
    """A copy of each channel, by a factor: a depthwise convolution of one token, without bias.

    Han et al. 2020, arXiv:1911.11907, section 3.1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return x * self.factor


class GhostAttention(nn.Module):
    """Multi-head self-attention of which half the channels of q, of k and of v are copies.

    The copies lie behind what they are of, so that they fill the second half of the heads.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        made = 3 * (config.inner_dim // 2)
        self.num_heads, self.scale = config.num_heads, config.attn_scale
        self.qkv = Linear(config.dim, made, bias=config.qkv_bias)
        self.cheap = CheapOperation(made)
        self.attn_dropout = nn.Dropout(config.attn_dropout_rate)
        self.proj = Linear(config.inner_dim, config.dim, bias=True) if config.attn_proj else None
        self.proj_dropout = nn.Dropout(config.dropout_rate if config.attn_proj else 0.0)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.qkv(x)
        halves = x, self.cheap(x)  # q, k and v side by side in each
        x = torch.cat([half.unflatten(-1, (3, -1)) for half in halves], dim=-1)
        q, k, v = split_heads(x.flatten(2), 3, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)


class GhostMlp(nn.Module):
    """Dense, activation, dense, where copies widen what the first product gives."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        dim, hidden_dim = config.dim, config.mlp_dim
        self.fc1 = Linear(dim, dim, bias=True)
        self.activation = ACTIVATIONS[config.activation]
        self.cheap = nn.ModuleList(CheapOperation(dim) for _ in range(hidden_dim // dim - 1))
        self.dropout1 = nn.Dropout(config.dropout_rate)
        self.fc2 = Linear(hidden_dim, dim, bias=True)
        self.dropout2 = nn.Dropout(config.dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.activation(self.fc1(x))
        copies = [self.activation(cheap(x)) for cheap in self.cheap]  # activated once more
        x = torch.cat([x, *copies], dim=-1)  # (batch, tokens, hidden)
        return self.dropout2(self.fc2(self.dropout1(x)))


class DenseBlock(Block):
    """A block whose output, by a product, is put behind its input; arXiv:1608.06993, eq. 2."""

    def __init__(self, config: BlockConfig, growth: int) -> None:
        super().__init__(config)
        self.dense_linear = Linear(config.dim, growth, bias=True)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens wider"]:
        return torch.cat([x, self.dense_linear(super().forward(x))], dim=-1)


class Transition(nn.Module):
    """Half of the width, between two stages of dense blocks."""

    def __init__(self, config: Halving, activation: str) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.out_dim, bias=True)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens half"]:
        return self.activation(self.linear(x))


def make_layer(config: T2TViTDesignsConfig, layer: BlockConfig | Halving) -> nn.Module:
    """A block of the design, or a transition between its stages."""
    if isinstance(layer, Halving):
        return Transition(layer, config.activation)
    match config.design:
        case "se":
            return Block(layer, attn=SEAttention(layer, config.se_dim))
        case "ghost":
            return Block(layer, attn=GhostAttention(layer), mlp=GhostMlp(layer))
        case "dense":
            return DenseBlock(layer, config.dense_growth)


class T2TViTDesigns(nn.Module):
    """Tokens-to-Token ViT with a design of convolutional networks.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: T2TViTDesignsConfig) -> None:
        super().__init__()
        self.config = config
        dim, features = config.embed_dim, config.feature_dim
        self.tokens_to_token = TokensToToken(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        learned, positions = config.pos_embed == "learned", torch.zeros(1, config.tokens, dim)
        if not learned:
            positions = torch.tensor(sinusoidal_positions(config.tokens, dim))[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=learned)
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList(make_layer(config, layer) for layer in config.layers)
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = nn.LayerNorm(features, eps=config.norm_eps) if has_norm else nn.Identity()
        self.head = Linear(features, config.num_classes, bias=True) if has_head else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        self.config.check_images(images.shape)
        x = self.tokens_to_token(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)  # in the dense design of another width each time
        if self.config.final_norm == "pooled":
            x = self.norm(pool(x, self.config))
        else:
            x = pool(self.norm(x), self.config)
        return self.head(x)
