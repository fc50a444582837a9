"""ViT in NumPy loops."""

from __future__ import annotations

import numpy as np

from isovit.spec.families.vit import ViTConfig
from parity_tests.oracles import pairs
from parity_tests.oracles.arrays import Array, TransformerReference
from parity_tests.oracles.originals import Original


class Reference(TransformerReference):
    """ViT; one patch after another."""

    config: ViTConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        x = self.patch_embed(self.config, images)
        return self.backbone(x, positions_first=self.config.pos_embed_tokens == "patches")

    def patch_embed(self, config: ViTConfig, images: Array) -> Array:
        """Patches to tokens."""
        (height, width), (rows, columns) = config.patch_size, config.grid
        patches = [
            images[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
            for i in range(rows)
            for j in range(columns)
        ]
        if config.patch_embed == "conv":
            kernel, bias = (self.weights[f"patch_embed.proj.{leaf}"] for leaf in ("kernel", "bias"))
            x = np.stack([np.einsum("bhwi,hwio->bo", p, kernel) + bias for p in patches], axis=1)
            self.keep("patch_embed.proj", x.reshape(len(x), rows, columns, -1))
        else:
            x = np.stack([patch.reshape(len(patch), -1) for patch in patches], axis=1)
            x = self.norm("patch_embed.norm1", x)
            x = self.norm("patch_embed.norm2", self.dense("patch_embed.proj", x))
        return self.keep("patch_embed", x)


ORIGINALS = {
    "vit_pytorch": Original("vit_pytorch", "vit_pytorch", lambda m: m.ViT, pairs.vit_pytorch_vits),
    "timm": Original(
        "timm", "timm.models.vision_transformer", lambda m: m.VisionTransformer, pairs.timm_vits
    ),
    "timm, distilled": Original(
        "timm",
        "timm.models.deit",
        lambda m: m.VisionTransformerDistilled,
        pairs.timm_distilled_vits,
    ),
}
