"""Efficient ViT in PyTorch.

Source: vit-pytorch's ``efficient.py`` (MIT); of the mixers Xiong et al. 2021, arXiv:2102.03902,
Choromanski et al. 2021, arXiv:2009.14794, and Shen et al. 2021, arXiv:1812.01243; see the spec.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.families.vit import NormLinearNormPatchEmbed
from isovit.backends.torch.layers import Block, DepthwiseConv, Linear, pool, split_heads
from isovit.spec.families.efficient_vit import EfficientViTConfig
from isovit.spec.initialize import normal_features


def pseudo_inverse(
    a: Float[Tensor, "batch heads rows rows"], iterations: int, norm: str
) -> Float[Tensor, "batch heads rows rows"]:
    """Z ← ¼ Z(13I − AZ(15I − AZ(7I − AZ))) from Aᵀ / (‖A‖₁ ‖A‖∞); arXiv:2102.03902, section 3.2.

    The rows of a softmax sum to 1, and so ‖A‖∞ is 1; ‖A‖₁ is the largest sum of a column, of each
    ``matrix`` or of the whole ``batch``.
    """
    columns = a.sum(dim=-2, keepdim=True)  # (batch, heads, 1, rows)
    z = a.mT / (columns.max() if norm == "batch" else columns.amax(dim=-1, keepdim=True))
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


class Mixer(nn.Module):
    """Multi-head attention whose heads mix their tokens by a rule of its own, ``mix``."""

    def __init__(self, config: EfficientViTConfig) -> None:
        super().__init__()
        block = config.block
        self.num_heads, self.scale = block.num_heads, block.attn_scale
        self.qkv = Linear(block.dim, 3 * block.inner_dim, bias=block.qkv_bias)
        self.proj = Linear(block.inner_dim, block.dim, bias=True) if block.attn_proj else None
        self.proj_dropout = nn.Dropout(block.dropout_rate if block.attn_proj else 0.0)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        # each (batch, heads, tokens, head_dim)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        x = self.mix(q, k, v).transpose(1, 2).flatten(2)  # (batch, tokens, heads * head_dim)
        if self.proj is not None:
            x = self.proj(x)
        return self.proj_dropout(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All (batch, heads, tokens, head_dim)."""
        raise NotImplementedError


class NystromAttention(Mixer):
    """softmax(q·k̃ᵀ) softmax(q̃·k̃ᵀ)⁺ softmax(q̃·kᵀ) v, q̃ and k̃ landmarks; arXiv:2102.03902, eq. 15.

    ``residual_conv`` adds v of the neighbours.
    """

    def __init__(self, config: EfficientViTConfig) -> None:
        super().__init__(config)
        self.num_landmarks = config.num_landmarks
        self.pinv_iterations, self.pinv_norm = config.pinv_iterations, config.pinv_norm
        self.residual_conv = (
            DepthwiseConv(
                self.num_heads,
                kernel_size=(kernel, 1),
                stride=(1, 1),
                padding=(kernel // 2, 0),
                bias=False,
            )
            if (kernel := config.residual_kernel) is not None
            else None
        )

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * self.scale
        keys = self.pad(k)  # (batch, heads, padded, head_dim)
        q_landmarks, k_landmarks = self.landmarks(self.pad(q)), self.landmarks(keys)
        to_landmarks = torch.softmax(q @ k_landmarks.mT, dim=-1)
        among_landmarks = torch.softmax(q_landmarks @ k_landmarks.mT, dim=-1)
        from_landmarks = torch.softmax(q_landmarks @ keys.mT, dim=-1)
        inverse = pseudo_inverse(among_landmarks, self.pinv_iterations, self.pinv_norm)
        y = to_landmarks @ (inverse @ (from_landmarks @ self.pad(v)))
        if self.residual_conv is not None:  # over the tokens, one kernel for all numbers of a head
            v = v.permute(0, 2, 3, 1)  # (batch, tokens, head_dim, heads)
            y = y + self.residual_conv(v).permute(0, 3, 1, 2)
        return y

    def pad(self, x: Tensor) -> Tensor:
        """Zeros before the tokens, so that each landmark is the mean of as many."""
        zeros = -x.shape[2] % self.num_landmarks
        return F.pad(x, (0, 0, zeros, 0)) if zeros else x

    def landmarks(self, x: Tensor) -> Tensor:
        """Means of neighbouring tokens, (batch, heads, landmarks, head_dim)."""
        return x.unflatten(2, (self.num_landmarks, -1)).mean(dim=3)


class PerformerAttention(Mixer):
    """φ(q)(φ(k)ᵀ v) / (φ(q)·Σ φ(k) + ε); Choromanski et al. 2021, arXiv:2009.14794, eq. 4, 5, 7."""

    def __init__(self, config: EfficientViTConfig) -> None:
        super().__init__(config)
        self.eps, self.stabilized = config.performer_eps, config.performer_stabilized
        features = normal_features(config.performer_features, config.block.head_dim)
        self.random_features = nn.Parameter(torch.tensor(features), requires_grad=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        root = math.sqrt(self.scale)  # of the factor on q·k: half of it is q's, half is k's
        q = self.feature_map(q * root, together=(-1,))  # (batch, heads, tokens, features)
        k = self.feature_map(k * root, together=(-2, -1))
        denominator = q @ k.sum(dim=-2, keepdim=True).mT  # (batch, heads, tokens, 1)
        numerator = q @ (k.mT @ v)  # (batch, heads, tokens, head_dim)
        return numerator / (denominator + self.eps)

    def feature_map(self, x: Tensor, together: tuple[int, ...]) -> Tensor:
        """φ(x) = exp(W x − ‖x‖² / 2 − c) / √m; c, a constant, is the largest of those together."""
        w = self.random_features.to(x.dtype)
        exponent = x @ w.mT - x.square().sum(-1, keepdim=True) / 2
        if self.stabilized:
            exponent = exponent - exponent.detach().amax(dim=together, keepdim=True)
        return torch.exp(exponent) / math.sqrt(w.shape[0])


class LinearAttention(Mixer):
    """softmax(q) (softmax(k)ᵀ v), q over its width and k over the tokens; arXiv:1812.01243, 3.2."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.softmax(q, dim=-1), torch.softmax(k, dim=-2)
        return q @ (k.mT @ v)


MIXERS = {"nystrom": NystromAttention, "performer": PerformerAttention, "linear": LinearAttention}


class Transformer(nn.Module):
    """Pre-norm blocks with one of the mixers, and a LayerNorm where the config wants one."""

    def __init__(self, config: EfficientViTConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(block, attn=None if config.mixer == "full" else MIXERS[config.mixer](config))
            for block in config.blocks
        )
        self.norm = (
            nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
            if config.transformer_norm
            else nn.Identity()
        )

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class EfficientViT(nn.Module):
    """Vision Transformer with any transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or the pooled features where the config has no head.

    Args:
        config: see ``EfficientViTConfig``.
        transformer: maps (batch, tokens, embed_dim) to the same; None for the one that the config
            describes.
    """

    def __init__(self, config: EfficientViTConfig, transformer: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = NormLinearNormPatchEmbed(config.stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        self.dropout = nn.Dropout(config.embed_dropout_rate)
        self.transformer = Transformer(config) if transformer is None else transformer
        has_norm, has_head = config.final_norm != "none", config.num_classes > 0
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if has_norm else nn.Identity()
        self.head = Linear(dim, config.num_classes, bias=True) if has_head else nn.Identity()

    def embed(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token, with its position: class token, patches."""
        self.config.check_images(images.shape)
        x = self.patch_embed(images)  # (batch, patches, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos_embed

    def encode(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Every token behind the transformer, and behind the norm if that is over tokens."""
        x = self.transformer(self.dropout(x))
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
