"""Rename tables of MAE: encoder and decoder as they were trained together.

Sources: facebookresearch/mae (CC BY-NC), whose files with the decoder are read where the caller
says that it is wanted (``--model mae_vit_b16``); without that they are read as a ViT. Hugging
Face's ``ViTMAEForPreTraining`` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from isovit.spec.objectives.mae import MAEConfig
from isovit.weight_convert.families import vit
from isovit.weight_convert.rename import RenameTable, rename, within


def mae(config: MAEConfig) -> RenameTable:
    """The official code: timm's names, and the decoder's beside them."""
    return RenameTable(
        *within("", "encoder", vit.timm_rows(config.encoder)),
        rename("mask_token", "mask_token"),
        rename("decoder_pos_embed", "decoder_pos_embed"),
        rename("decoder_embed", "decoder_embed"),
        *(
            replace(
                row, foreign=(f"decoder_{row.foreign[0]}",), canonical=f"decoder_{row.canonical}"
            )
            for row in vit.block_rows()
        ),
        rename("decoder_norm", "decoder_norm"),
        rename("decoder_pred", "decoder_pred"),
    )


def hf(config: MAEConfig) -> RenameTable:
    """Hugging Face: the encoder without ``vit.``, as all releases are brought to one form."""
    return RenameTable(
        *within("", "encoder", vit.hf_rows(config.encoder)),
        rename("decoder.mask_token", "mask_token"),
        rename("decoder.decoder_pos_embed", "decoder_pos_embed"),
        rename("decoder.decoder_embed", "decoder_embed"),
        *vit.hf_layer_rows("decoder.decoder_layers.{i}", "decoder_blocks.{i}"),
        rename("decoder.decoder_norm", "decoder_norm"),
        rename("decoder.decoder_pred", "decoder_pred"),
    )


TABLES: dict[str, Callable[[MAEConfig], RenameTable]] = {"mae": mae, "hf": hf}


def hf_config(config: MAEConfig) -> dict[str, Any]:
    """``config.json``, as ViTMAEConfig of transformers wants it."""
    return {
        **vit.hf_config(config.encoder),
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": config.decoder_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_intermediate_size": config.decoder_mlp_dim,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.normalized_pixels,
    }


def misfits(config: MAEConfig) -> Iterator[str]:
    """What neither the official code's model nor Hugging Face's can be told to be."""
    yield from vit.mae_misfits(config.encoder)
    if config.encoder.patch_embed != "conv":
        yield f"patch_embed={config.encoder.patch_embed}"
    if config.encoder.pos_embed != "sincos":
        yield "positions that are learned"
    if config.mask_rounds_down != "kept":
        yield f"mask_rounds_down={config.mask_rounds_down}"
    if not config.decoder_embed:
        yield "decoder_embed=false"
    if config.decoder_head_dim not in (None, config.decoder_dim / config.decoder_num_heads):
        yield "heads that do not fill decoder_dim"


MISFITS: dict[str, Callable[[MAEConfig], Iterator[str]]] = {"mae": misfits, "hf": misfits}
