"""CrossViT in PyTorch.

Source: Chen et al. 2021, arXiv:2103.14899, section 3; the official code and timm (Apache-2.0) and
vit-pytorch's ``cross_vit.py`` (MIT); see the spec for the differences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isovit.backends.torch.families.vit import PATCH_EMBEDS
from isovit.backends.torch.layers import (
    ACTIVATIONS,
    Block,
    Conv,
    DropPath,
    Linear,
    attention,
    resample,
    split_heads,
)
from isovit.spec.blocks import BlockConfig
from isovit.spec.families.crossvit import STEMS, Branch, CrossViTConfig, Fusion, Stage
from isovit.spec.resample import torch_bicubic


class BicubicResize(nn.Module):
    """The image at the size of a branch, R X Cᵀ: the same on every framework."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        matrices = map(torch_bicubic, branch.source_size, branch.image_size)
        # No buffers: those are rounded for good when the model is cast.
        self.rows, self.columns = map(torch.from_numpy, matrices)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        return resample(images, self.rows, self.columns)


class CentreCrop(nn.Module):
    """The centre of the image, of the size of a branch."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.corner, self.size = branch.corner, branch.image_size

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        (top, left), (rows, columns) = self.corner, self.size
        return images[:, top : top + rows, left : left + columns]


class ConvStem(nn.Module):
    """Three convolutions that together have the stride of a patch; the models marked †."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        dim1, dim2, dim3 = branch.stem_dims
        first, second, third = (shape._asdict() for shape in STEMS[branch.patch_size])
        self.conv1 = Conv(branch.in_channels, dim1, **first, bias=True)
        self.conv2 = Conv(dim1, dim2, **second, bias=True)
        self.conv3 = Conv(dim2, dim3, **third, bias=True)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = F.relu(self.conv1(images))
        x = F.relu(self.conv2(x))
        x = self.conv3(x)  # (batch, rows, columns, dim)
        return x.flatten(1, 2)


RESIZES = {"bicubic": BicubicResize, "crop": CentreCrop}


class BranchEmbed(nn.Module):
    """From the model's image to the tokens of one branch, class token first."""

    def __init__(self, config: CrossViTConfig, branch: Branch) -> None:
        super().__init__()
        resized = branch.scaling != "none"
        self.resize = RESIZES[branch.scaling](branch) if resized else nn.Identity()
        self.patch_embed = (
            ConvStem(branch)
            if config.patch_embed == "conv_stem"
            else PATCH_EMBEDS[config.patch_embed](config.stem(branch))
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, branch.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, branch.tokens, branch.dim))
        self.dropout = nn.Dropout(config.embed_dropout_rate)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.patch_embed(self.resize(images))  # (batch, patches, dim)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.dropout(x + self.pos_embed)


class CrossAttention(nn.Module):
    """Attention of one token over others; section 3.3, eq. 6."""

    def __init__(self, config: CrossViTConfig, fusion: Fusion) -> None:
        super().__init__()
        dim, inner_dim = fusion.other_dim, fusion.inner_dim
        self.num_heads = fusion.num_heads
        self.scale = fusion.head_dim**-0.5
        self.q = Linear(dim, inner_dim, bias=config.qkv_bias)
        self.kv = Linear(dim, 2 * inner_dim, bias=config.qkv_bias)
        self.attn_dropout = nn.Dropout(config.attn_dropout_rate)
        self.proj = Linear(inner_dim, dim, bias=True)
        self.proj_dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, token: Float[Tensor, "batch 1 dim"], context: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch 1 dim"]:
        (q,) = split_heads(self.q(token), 1, self.num_heads)  # (batch, heads, 1, head_dim)
        # each (batch, heads, tokens, head_dim)
        k, v = split_heads(self.kv(context), 2, self.num_heads)
        x = attention(q, k, v, self.scale, self.attn_dropout)
        x = x.transpose(1, 2).flatten(2)  # (batch, 1, heads * head_dim)
        return self.proj_dropout(self.proj(x))


class ProjectedFusion(nn.Module):
    """The class token goes to the other branch's width and back; section 3.3, eq. 5 and 7."""

    def __init__(self, config: CrossViTConfig, fusion: Fusion) -> None:
        super().__init__()
        dim, other_dim, eps = fusion.dim, fusion.other_dim, config.norm_eps
        self.activation = ACTIVATIONS[config.activation]
        self.norm_in = nn.LayerNorm(dim, eps=eps)
        self.proj_in = Linear(dim, other_dim, bias=True)
        self.norm = nn.LayerNorm(other_dim, eps=eps)
        self.attn = CrossAttention(config, fusion)
        self.drop_path = DropPath(fusion.drop_path_rate)
        self.norm_out = nn.LayerNorm(other_dim, eps=eps)
        self.proj_out = Linear(other_dim, dim, bias=True)

    def forward(
        self, token: Float[Tensor, "batch 1 dim"], patches: Float[Tensor, "batch tokens other_dim"]
    ) -> Float[Tensor, "batch 1 dim"]:
        x = self.proj_in(self.activation(self.norm_in(token)))  # (batch, 1, other_dim)
        context = self.norm(torch.cat([x, patches], dim=1))
        x = x + self.drop_path(self.attn(context[:, :1], context))
        return self.proj_out(self.activation(self.norm_out(x)))


class CrossLayer(nn.Module):
    """What the class token reads from the other branch's patches, at its own width."""

    def __init__(self, config: CrossViTConfig, fusion: Fusion) -> None:
        super().__init__()
        dim, other_dim = fusion.dim, fusion.other_dim
        same = dim == other_dim
        self.proj_in = nn.Identity() if same else Linear(dim, other_dim, bias=True)
        self.norm = nn.LayerNorm(other_dim, eps=config.norm_eps)
        self.attn = CrossAttention(config, fusion)
        self.proj_out = nn.Identity() if same else Linear(other_dim, dim, bias=True)
        self.drop_path = DropPath(fusion.drop_path_rate)

    def forward(
        self, token: Float[Tensor, "batch 1 dim"], patches: Float[Tensor, "batch tokens other_dim"]
    ) -> Float[Tensor, "batch 1 dim"]:
        x = self.norm(self.proj_in(token))  # (batch, 1, other_dim)
        x = self.attn(x, torch.cat([x, patches], dim=1))
        return self.drop_path(self.proj_out(x))


class ResidualFusion(nn.Module):
    """The class token adds up what it reads in several layers, of vit-pytorch."""

    def __init__(self, config: CrossViTConfig, fusion: Fusion) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer(config, fusion) for _ in range(config.cross_depth))

    def forward(
        self, token: Float[Tensor, "batch 1 dim"], patches: Float[Tensor, "batch tokens other_dim"]
    ) -> Float[Tensor, "batch 1 dim"]:
        for layer in self.layers:
            token = token + layer(token, patches)
        return token


FUSIONS = {"projected": ProjectedFusion, "residual": ResidualFusion}


class Encoder(nn.Module):
    """The blocks of one branch in one stage."""

    def __init__(self, config: CrossViTConfig, dim: int, blocks: tuple[BlockConfig, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(block) for block in blocks)
        norm = config.stage_norm
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if norm else nn.Identity()

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MultiScaleStage(nn.Module):
    """Blocks in both branches, then each class token reads the other's patches; figure 2."""

    def __init__(self, config: CrossViTConfig, stage: Stage) -> None:
        super().__init__()
        encoders = zip(config.embed_dim, stage.blocks, strict=True)
        self.encoders = nn.ModuleList(Encoder(config, dim, blocks) for dim, blocks in encoders)
        fusion = FUSIONS[config.fusion]
        self.fusions = nn.ModuleList(fusion(config, numbers) for numbers in stage.fusions)

    def forward(
        self,
        small: Float[Tensor, "batch small_tokens small_dim"],
        large: Float[Tensor, "batch large_tokens large_dim"],
    ) -> tuple[
        Float[Tensor, "batch small_tokens small_dim"], Float[Tensor, "batch large_tokens large_dim"]
    ]:
        small, large = self.encoders[0](small), self.encoders[1](large)
        small_patches, large_patches = small[:, 1:], large[:, 1:]
        small_token = self.fusions[0](small[:, :1], large_patches)
        large_token = self.fusions[1](large[:, :1], small_patches)
        return (
            torch.cat([small_token, small_patches], dim=1),
            torch.cat([large_token, large_patches], dim=1),
        )


class CrossViT(nn.Module):
    """Cross-attention multi-scale Vision Transformer.

    Called with (batch, height, width, channels) images of ``config.image_size``; returns
    (batch, num_classes) logits, or both branches' features side by side where the config has no
    heads.
    """

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__()
        self.config = config
        dims, classes = config.embed_dim, config.num_classes
        self.embeds = nn.ModuleList(BranchEmbed(config, branch) for branch in config.branches)
        self.stages = nn.ModuleList(MultiScaleStage(config, stage) for stage in config.stages)
        self.norm = nn.ModuleList(nn.LayerNorm(dim, eps=config.norm_eps) for dim in dims)
        self.dropout = nn.Dropout(config.head_dropout_rate)
        heads = [Linear(dim, classes, bias=True) for dim in dims] if classes else []
        self.head = nn.ModuleList(heads)

    def forward(
        self, images: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch ..."]:
        self.config.check_images(images.shape)
        small, large = self.embeds[0](images), self.embeds[1](images)
        for stage in self.stages:
            small, large = stage(small, large)
        small, large = self.norm[0](small), self.norm[1](large)
        if self.config.pool == "mean_patches":
            small, large = small[:, 1:].mean(dim=1), large[:, 1:].mean(dim=1)
        else:
            small, large = small[:, 0], large[:, 0]
        small, large = self.dropout(small), self.dropout(large)
        if not self.config.num_classes:
            return torch.cat([small, large], dim=-1)
        logits = self.head[0](small) + self.head[1](large)
        return logits / 2 if self.config.logits == "mean" else logits
