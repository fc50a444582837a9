"""MAE beside transformers' and vit-pytorch's: one loss for one mask, and files both ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import isovit
from isovit.parity.job import draw_inputs
from isovit.spec.families.vit import ViTConfig
from isovit.spec.initialize import init
from isovit.spec.objectives.mae import MAEConfig
from isovit.spec.positions import sincos_positions
from parity_tests.agreement import assert_outputs_agree
from parity_tests.oracles.importing import import_oracle
from parity_tests.subject import Subject
from parity_tests.test_foreign import folder, randomised

pytestmark = pytest.mark.oracles

FEWER = settings(max_examples=max(3, settings.default.max_examples // 8))


def losses(backend: Subject, config: MAEConfig, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Ours, for two images."""
    images, _, others = draw_inputs(config, batch=2, seed=0)
    model = backend.runtime.build(config, weights, dtype="float64", device="cpu")
    return backend.runtime.forward(model, images, others)


def inputs(config: MAEConfig) -> tuple[torch.Tensor, np.ndarray]:
    """The same images, channels first, and the orders of their patches."""
    images, _, others = draw_inputs(config, batch=2, seed=0)
    return torch.tensor(images).double().permute(0, 3, 1, 2), others["order"]


# transformers


@st.composite
def hf_pairs(draw: st.DrawFn) -> tuple[dict[str, Any], MAEConfig]:
    """Arguments of ViTMAEConfig and what they mean; it takes square images alone."""
    patch, side = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    heads, decoder_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    told = dict(
        image_size=patch * side,
        patch_size=patch,
        num_channels=draw(st.integers(1, 3)),
        hidden_size=4 * heads * draw(st.integers(2, 3)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(5, 20)),
        qkv_bias=draw(st.booleans()),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-6])),
        decoder_hidden_size=4 * decoder_heads * draw(st.integers(2, 3)),
        decoder_num_hidden_layers=draw(st.integers(1, 2)),
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=draw(st.integers(5, 20)),
        mask_ratio=draw(st.sampled_from([0.5, 0.6, 0.74])),
        norm_pix_loss=draw(st.booleans()),
    )
    statistics = {"mean": (0.5,) * told["num_channels"], "std": (0.5,) * told["num_channels"]}
    encoder = ViTConfig(
        image_size=told["image_size"],
        patch_size=told["patch_size"],
        in_channels=told["num_channels"],
        preprocess=statistics,
        num_classes=0,
        embed_dim=told["hidden_size"],
        depth=told["num_hidden_layers"],
        num_heads=heads,
        mlp_dim=told["intermediate_size"],
        qkv_bias=told["qkv_bias"],
        norm_eps=told["layer_norm_eps"],
        pos_embed="sincos",
    )
    return told, MAEConfig(
        encoder=encoder,
        mask_ratio=told["mask_ratio"],
        decoder_dim=told["decoder_hidden_size"],
        decoder_depth=told["decoder_num_hidden_layers"],
        decoder_num_heads=decoder_heads,
        decoder_mlp_dim=told["decoder_intermediate_size"],
        normalized_pixels=told["norm_pix_loss"],
    )


def hf_losses(original: nn.Module, config: MAEConfig) -> np.ndarray:
    """Theirs, image by image: they give the mean alone. Noise in the given order orders patches."""
    images, order = inputs(config)
    noise = torch.tensor(np.argsort(order, axis=1)).double()
    with torch.inference_mode():
        found = [
            original.double()(images[i : i + 1], noise=noise[i : i + 1]).loss for i in range(2)
        ]
    return torch.stack(found).numpy()


@FEWER
@given(pair=hf_pairs())
def test_transformers(
    backend: Subject, pair: tuple[dict[str, Any], MAEConfig], pytestconfig: pytest.Config
) -> None:
    """And its folder, read and written: as one objective, and as the encoder alone."""
    library = import_oracle("transformers", pytestconfig)
    told, config = pair
    torch.manual_seed(0)
    original = randomised(library.ViTMAEForPreTraining(library.ViTMAEConfig(**told)))
    with folder() as path:
        original.save_pretrained(path / "theirs")
        found = isovit.load(path / "theirs", config=config)
        wanted = hf_losses(original, config)
        assert_outputs_agree(losses(backend, config, found.weights), wanted)
        isovit.save(found, path / "ours", "hf")
        again = library.ViTMAEForPreTraining.from_pretrained(path / "ours").eval()
        assert not isovit.load(path / "theirs", changes={"pool": "none"}).config.num_classes
    theirs = original.state_dict()
    assert all(torch.equal(again.state_dict()[n].double(), theirs[n].double()) for n in theirs)
    assert_outputs_agree(hf_losses(again, config), wanted)


def test_positions_are_those_of_transformers(pytestconfig: pytest.Config) -> None:
    """Rows before columns there; its models exchange the halves, to be as the official code."""
    library = import_oracle("transformers.models.vit_mae.modeling_vit_mae", pytestconfig)
    rows_first = library.build_2d_sinusoidal_position_embedding(3, 4, 24, cls_token=True)
    rows, columns = rows_first.double().chunk(2, dim=1)
    theirs = torch.cat([columns, rows], dim=1).numpy()
    assert_outputs_agree(sincos_positions((3, 4), 24, 1), theirs, "float32")


# The official code: names, which no package has


OFFICIAL = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}


def test_a_file_of_the_official_code(tmp_path: Path) -> None:
    encoder = ViTConfig(
        image_size=8, patch_size=4, num_classes=0, pos_embed="sincos", embed_dim=8, depth=1,
        num_heads=2, mlp_dim=12,
    )  # fmt: skip
    config = MAEConfig(
        encoder=encoder, decoder_dim=12, decoder_depth=1, decoder_num_heads=3, decoder_mlp_dim=10
    )
    ours, path = isovit.Checkpoint(config, init(config)), tmp_path / "mae.pth"
    isovit.save(ours, path, "mae")
    content = torch.load(path, weights_only=True)["model"]
    named = {
        *("cls_token", "pos_embed", "mask_token", "decoder_pos_embed"),
        *(
            f"{module}.{leaf}"
            for module in (
                *("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"),
                *(
                    f"{blocks}.0.{part}"
                    for blocks in ("blocks", "decoder_blocks")
                    for part in OFFICIAL
                ),
            )
            for leaf in ("weight", "bias")
        ),
    }
    assert content.keys() == named
    save_file(content, tmp_path / "bare.safetensors")
    again = isovit.load(tmp_path / "bare.safetensors", config=config, format="mae")
    assert all(np.array_equal(again.weights[name], ours.weights[name]) for name in ours.weights)
    alone = isovit.load(tmp_path / "bare.safetensors", changes={"num_heads": 2})
    assert alone.config.family == "vit"
    assert any("decoder of the pre-training" in note for note in alone.source.notes)


# vit-pytorch


@st.composite
def vit_pytorch_pairs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], MAEConfig]:
    """Arguments of ViT and of MAE, and what they mean; its encoder must pool by the mean."""
    patch, side = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    vit = dict(
        image_size=patch * side,
        patch_size=patch,
        num_classes=3,
        dim=draw(st.integers(6, 20)),
        depth=draw(st.integers(0, 2)),
        heads=draw(st.integers(1, 3)),
        mlp_dim=draw(st.integers(4, 20)),
        dim_head=draw(st.integers(2, 8)),
        pool="mean",
    )
    same = draw(st.booleans())
    mae = dict(
        decoder_dim=vit["dim"] if same else vit["dim"] + 1,
        masking_ratio=draw(st.sampled_from([0.5, 0.6, 0.74])),
        decoder_depth=draw(st.integers(1, 2)),
        decoder_heads=draw(st.integers(1, 3)),
        decoder_dim_head=draw(st.integers(2, 8)),
    )
    encoder = ViTConfig(
        image_size=vit["image_size"],
        patch_size=patch,
        num_classes=0,
        patch_embed="norm_linear_norm",
        embed_dim=vit["dim"],
        depth=vit["depth"],
        num_heads=vit["heads"],
        head_dim=vit["dim_head"],
        qkv_bias=False,
        mlp_dim=vit["mlp_dim"],
        norm_eps=1e-5,
        class_token=False,
        pool="mean",
    )
    return (
        vit,
        mae,
        MAEConfig(
            encoder=encoder,
            mask_ratio=mae["masking_ratio"],
            mask_rounds_down="hidden",
            decoder_embed=not same,
            decoder_dim=mae["decoder_dim"],
            decoder_depth=mae["decoder_depth"],
            decoder_num_heads=mae["decoder_heads"],
            decoder_head_dim=mae["decoder_dim_head"],
            decoder_mlp_dim=4 * mae["decoder_dim"],
            normalized_pixels=False,
        ),
    )


def encoder_weights(vit: nn.Module, config: ViTConfig, path: Path) -> dict[str, np.ndarray]:
    """Of a ViT of vit-pytorch, by the table of the format; without the head."""
    save_file(vit.state_dict(), path / "vit.safetensors")
    with_head = config.replace(num_classes=vit.mlp_head.out_features)
    found = isovit.load(path / "vit.safetensors", config=with_head, format="vit_pytorch")
    return {name: array for name, array in found.weights.items() if not name.startswith("head")}


def layer_weights(layers: nn.ModuleList, name: str) -> dict[str, np.ndarray]:
    """Of the layers of a Transformer of vit-pytorch, module by module."""
    found: dict[str, np.ndarray] = {}
    for i, (attn, mlp) in enumerate(layers):
        for path, module in {
            "norm1": attn.norm, "attn.qkv": attn.to_qkv, "attn.proj": attn.to_out[0],
            "norm2": mlp.net[0], "mlp.fc1": mlp.net[1], "mlp.fc2": mlp.net[4],
        }.items():  # fmt: skip
            found |= module_weights(module, f"{name}.{i}.{path}")
    return found


def module_weights(module: nn.Module, path: str) -> dict[str, np.ndarray]:
    """Of a Linear or a LayerNorm."""
    weight, is_norm = module.weight.detach().numpy(), isinstance(module, nn.LayerNorm)
    found = {f"{path}.scale": weight} if is_norm else {f"{path}.kernel": weight.T}
    if module.bias is not None:
        found[f"{path}.bias"] = module.bias.detach().numpy()
    return found


@FEWER
@given(drawn=vit_pytorch_pairs())
def test_vit_pytorch(
    backend: Subject,
    drawn: tuple[dict[str, Any], dict[str, Any], MAEConfig],
    pytestconfig: pytest.Config,
) -> None:
    """Its release works with an encoder that pools by the mean; it hides the first of an order."""
    library = import_oracle("vit_pytorch", pytestconfig)
    vit, mae, config = drawn
    torch.manual_seed(0)
    original: Any = randomised(library.MAE(encoder=library.ViT(**vit), **mae))
    with folder() as path:
        encoder = encoder_weights(original.encoder, config.encoder, path)
    weights = {f"encoder.{name}": array for name, array in encoder.items()}
    weights |= layer_weights(original.decoder.layers, "decoder_blocks")
    weights |= module_weights(original.decoder.norm, "decoder_norm")
    weights |= module_weights(original.to_pixels, "decoder_pred")
    if config.decoder_embed:
        weights |= module_weights(original.enc_to_dec, "decoder_embed")
    weights["mask_token"] = original.mask_token.detach().numpy()[None, None]
    weights["decoder_pos_embed"] = original.decoder_pos_emb.weight.detach().numpy()[None]
    assert_outputs_agree(losses(backend, config, weights), vit_pytorch_losses(original, config))


def vit_pytorch_losses(original: Any, config: MAEConfig) -> np.ndarray:
    """Theirs, image by image, with noise that orders the patches as ours: hidden ones first."""
    images, order = inputs(config)
    theirs = np.concatenate([order[:, config.kept :], order[:, : config.kept]], axis=1)
    noise, found = torch.tensor(np.argsort(theirs, axis=1)).double(), []
    with torch.inference_mode(), torch.device("cpu"), pytest.MonkeyPatch.context() as patch:
        torch.set_default_dtype(torch.float64)  # of the tokens that it fills
        try:
            for i in range(2):
                patch.setattr(torch, "rand", lambda *_, i=i, **__: noise[i : i + 1])
                found.append(original.double()(images[i : i + 1]))
        finally:
            torch.set_default_dtype(torch.float32)
    return torch.stack(found).numpy()


@pytest.mark.parametrize(
    "change",
    [
        {"normalized_pixels": True},
        {"encoder.norm_eps": 1e-5},
        {"encoder.activation": "gelu_tanh"},
        {"mask_ratio": 0.6},
    ],
    ids=str,
)
def test_another_config_is_another_loss(backend: Subject, change: dict[str, Any]) -> None:
    """What the comparisons above would see."""
    encoder = ViTConfig(
        image_size=12, patch_size=4, num_classes=0, embed_dim=12, depth=1, num_heads=2, mlp_dim=9
    )
    config = MAEConfig(
        encoder=encoder, mask_ratio=0.5, decoder_dim=8, decoder_depth=1, decoder_num_heads=2,
        decoder_mlp_dim=9, normalized_pixels=False,
    )  # fmt: skip
    weights = isovit.init(config)
    found = losses(backend, config.replace(**change), weights)
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(found, losses(backend, config, weights))
