"""T2T-ViT in PyTorch.

Source: Yuan et al. 2021, arXiv:2101.11986, section 3; the official code (Clear BSD) and, for the
full-width mixer, vit-pytorch's ``t2t.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends import products
from isovit.backends.torch.layers import Block, Linear, Mlp, attention, pool
from isovit.spec.families.t2t_vit import SoftSplit, Stage, T2TViTConfig
from isovit.spec.initialize import orthogonal_features
from isovit.spec.positions import sinusoidal_positions


def soft_split(
    x: Float[Tensor, "batch rows columns dim"], split: SoftSplit
) -> Float[Tensor, "batch tokens patch"]:
    """Overlapping patches, each flattened as (channel, height, width); section 3.1, eq. 3."""
    kernel, stride, padding = split
    rows, columns = split.output(x.shape[1]), split.output(x.shape[2])
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    shifts = [x[:, i : i + stride * rows : stride] for i in range(kernel)]
    x = torch.stack(shifts, dim=-1)  # (batch, rows, width, dim, kernel)
    shifts = [x[:, :, j : j + stride * columns : stride] for j in range(kernel)]
    x = torch.stack(shifts, dim=-1)  # (batch, rows, columns, dim, kernel, kernel)
    return x.reshape(x.shape[0], rows * columns, -1)  # (batch, tokens, dim * kernel * kernel)


class TokenPerformer(nn.Module):
    """Token mixer with linear attention; Choromanski et al. 2021, arXiv:2009.14794, eq. 5 and 7.

    One head, width falls to ``token_dim``; q and k are not scaled, and the residual is v.
    """

    def __init__(self, config: T2TViTConfig, stage: Stage) -> None:
        super().__init__()
        dim, eps = config.token_dim, config.norm_eps
        self.eps, self.upcast = config.performer_eps, config.performer_upcast
        self.norm1 = nn.LayerNorm(stage.dim, eps=eps)
        self.kqv = Linear(stage.dim, 3 * dim, bias=True)
        features = torch.tensor(orthogonal_features(config.performer_features, dim))
        self.random_features = nn.Parameter(features, requires_grad=False)
        self.proj = Linear(dim, dim, bias=True)
        self.dropout1 = nn.Dropout(config.token_dropout_rate)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, config.token_mlp_dim, config.activation, dropout_rate=0.0)
        self.dropout2 = nn.Dropout(config.token_dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens patch"]) -> Float[Tensor, "batch tokens dim"]:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # in this order
        y = v + self.dropout1(self.proj(self.attention(q, k, v)))
        return y + self.dropout2(self.mlp(self.norm2(y)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Σ_s φ(q)·φ(k_s) v_s / (φ(q)·Σ_s φ(k_s) + ε), all (batch, tokens, dim)."""
        dtype = v.dtype
        wide = torch.promote_types(dtype, torch.float32) if self.upcast else dtype
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        # Autocast would round in every product what was just widened.
        with nullcontext() if wide == dtype else torch.autocast(v.device.type, enabled=False):
            q, k = self.feature_map(q), self.feature_map(k)  # (batch, tokens, features)
            denominator = q @ k.sum(dim=1, keepdim=True).mT  # (batch, tokens, 1)
            numerator = q @ (k.mT @ v)  # (batch, tokens, dim)
            return (numerator / (denominator + self.eps)).to(dtype)

    def feature_map(self, x: Tensor) -> Tensor:
        """φ(x) = exp(W x − ‖x‖² / 2) / √m."""
        w = self.random_features.to(x.dtype)
        return torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])


class TokenAttention(nn.Module):
    """One head of self-attention whose width falls to ``token_dim`` and whose residual is v."""

    def __init__(self, config: T2TViTConfig, stage: Stage) -> None:
        super().__init__()
        dim = config.token_dim
        self.scale = (stage.dim if config.token_scale == "input_dim" else dim) ** -0.5
        self.qkv = Linear(stage.dim, 3 * dim, bias=False)
        self.attn_dropout = nn.Dropout(config.token_dropout_rate)
        self.proj = Linear(dim, dim, bias=True)
        self.proj_dropout = nn.Dropout(config.token_dropout_rate)

    def forward(self, x: Float[Tensor, "batch tokens patch"]) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)  # each (batch, 1, tokens, dim)
        x = attention(q, k, v, self.scale, self.attn_dropout)[:, 0]
        return v[:, 0] + self.proj_dropout(self.proj(x))


class TokenTransformer(nn.Module):
    """Token mixer with softmax attention, of the official code."""

    def __init__(self, config: T2TViTConfig, stage: Stage) -> None:
        super().__init__()
        dim, eps, rate = config.token_dim, config.norm_eps, config.token_dropout_rate
        self.norm1 = nn.LayerNorm(stage.dim, eps=eps)
        self.attn = TokenAttention(config, stage)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, config.token_mlp_dim, config.activation, rate)

    def forward(self, x: Float[Tensor, "batch tokens patch"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FullMixer(nn.Module):
    """Token mixer at full width, of vit-pytorch: a block of one head, then a LayerNorm."""

    def __init__(self, config: T2TViTConfig, stage: Stage) -> None:
        super().__init__()
        self.block = Block(config.full_mixer(stage.dim))
        self.norm = nn.LayerNorm(stage.dim, eps=config.norm_eps)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.norm(self.block(x))


MIXERS = {"performer": TokenPerformer, "transformer": TokenTransformer, "full": FullMixer}


class SplitProjection(Linear):
    """The last soft split and the product behind it: x·Wᵀ + b of every patch x; section 3.1."""

    def __init__(self, stage: Stage, dim_out: int) -> None:
        super().__init__(stage.dim, dim_out, bias=True)
        self.split = stage.split

    def forward(
        self, input: Float[Tensor, "batch rows columns dim"]
    ) -> Float[Tensor, "batch tokens dim_out"]:
        if products.convolves(input):
            return products.patch_linear(input, self.weight, self.bias, self.split)
        return super().forward(soft_split(input, self.split))


class TokensToToken(nn.Module):
    """The stem: soft splits with a token mixer between each and the next; section 3.1."""

    def __init__(self, config: T2TViTConfig) -> None:
        super().__init__()
        self.stages = config.stages
        mixer, last = MIXERS[config.token_mixer], self.stages[-1]
        self.mixers = nn.ModuleList(mixer(config, stage) for stage in self.stages[:-1])
        self.project = SplitProjection(last, config.embed_dim)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = images
        for stage, mixer in zip(self.stages, self.mixers, strict=False):
            x = mixer(soft_split(x, stage.split))  # (batch, tokens, dim)
            x = x.unflatten(1, stage.grid)  # (batch, rows, columns, dim)
        return self.project(x)


class T2TViT(nn.Module):
    """Tokens-to-Token ViT.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.
    """

    def __init__(self, config: T2TViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.tokens_to_token = TokensToToken(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        learned, positions = config.pos_embed == "learned", torch.zeros(1, config.tokens, dim)
        if not learned:
            positions = torch.tensor(sinusoidal_positions(config.tokens, dim))[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=learned)
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.blocks = nn.ModuleList(Block(block) for block in config.blocks)
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if has_norm else nn.Identity()
        self.head = Linear(dim, config.num_classes, bias=True) if has_head else nn.Identity()

    def embed(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token, with its position: class token, patches."""
        self.config.check_images(images.shape)
        x = self.tokens_to_token(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos_embed

    def encode(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the blocks, and behind the norm if that is over tokens."""
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return x if self.config.final_norm == "pooled" else self.norm(x)

    def classify(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch ..."]:
        """Logits of such tokens; features where there is no head."""
        x = pool(x, self.config)
        if self.config.final_norm == "pooled":
            x = self.norm(x)
        return self.head(x)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        return self.classify(self.encode(self.embed(images)))
