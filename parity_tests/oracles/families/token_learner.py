"""TokenLearner in NumPy loops, and what scenic's model can hold."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from isovit.spec.families.token_learner import TokenLearnerConfig
from parity_tests.oracles import arrays, scenic
from parity_tests.oracles.arrays import ACTIVATIONS, Array, attend
from parity_tests.oracles.fitting import Fields, Fit
from parity_tests.oracles.originals import Original
from parity_tests.oracles.pairs import (
    Pair,
    channel_counts,
    classes,
    divisible,
    head_counts,
    patches,
    statistics,
    widths,
)


class Reference(arrays.Reference):
    """A ViT with TokenLearner; one learned token after another."""

    config: TokenLearnerConfig

    def output(self, images: Array) -> Array:
        """See ``Reference.output``."""
        config = self.config
        x = self.conv("patch_embed.proj", images, config.patch_size, (0, 0))
        x = self.keep("patch_embed", x.reshape(len(x), -1, x.shape[-1]))
        x = x + self.weights["pos_embed"]
        for i in range(config.depth):
            learns = config.learner != "none" and i >= config.learner_loc
            if learns and config.fuser:
                j = i - config.learner_loc
                y = self.block_of(f"blocks.{i}", self.learn(f"learners.{j}", x))
                x = self.fuse(f"fusers.{j}", y, x) + x
                continue
            if learns and i == config.learner_loc:
                x = self.learn("learners.0", x)
            x = self.block_of(f"blocks.{i}", x)
        if config.learner != "none" and config.learner_loc == config.depth:
            x = self.learn("learners.0", x)
        x = self.norm("norm", x)
        x = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1]
        return self.dense("head", x) if config.num_classes else x

    def block_of(self, path: str, x: Array) -> Array:
        """A pre-norm block, whose MLP may end with the activation, too."""
        numbers = self.config.block
        qkv = self.dense(f"{path}.attn.qkv", self.norm(f"{path}.norm1", x))
        y = self.dense(f"{path}.attn.proj", attend(qkv, numbers.num_heads, numbers.attn_scale))
        x = x + self.keep(f"{path}.attn", y)
        y = self.dense(f"{path}.mlp.fc1", self.norm(f"{path}.norm2", x))
        y = self.dense(f"{path}.mlp.fc2", self.activate(y))
        y = self.activate(y) if self.config.mlp_output_activation else y
        return self.keep(path, x + self.keep(f"{path}.mlp", y))

    def activate(self, x: Array) -> Array:
        """The one activation of a config."""
        return ACTIVATIONS[self.config.activation](x)

    def learn(self, path: str, x: Array) -> Array:
        """Tokens from (batch, places, dim): of one map after another, place after place."""
        maps, (batch, places, dim) = self.maps(path, x), x.shape
        learned = np.zeros((batch, self.config.learned_tokens, dim), np.result_type(x, maps))
        for token in range(learned.shape[1]):
            for place in range(places):
                learned[:, token] += maps[:, place, token, None] * x[:, place]
        mean = self.config.learner_pool == "mean"
        return self.keep(path, learned / places if mean else learned)

    def maps(self, path: str, x: Array) -> Array:
        """(batch, places, tokens): what each learned token takes of each place."""
        normed = self.norm(f"{path}.norm", x)
        if self.config.learner == "mlp":
            scores = self.mask(f"{path}.mask", normed)
            powers = np.exp(scores - np.real(scores).max(axis=1, keepdims=True))
            return powers / powers.sum(axis=1, keepdims=True)
        image = normed.reshape(len(x), *self.config.grid, x.shape[-1])
        image = self.conv(f"{path}.convs.0", image, (1, 1), (1, 1))
        for i in (1, 2, 3):
            image = self.conv(f"{path}.convs.{i}", self.activate(image), (1, 1), (1, 1))
        return sigmoid(image.reshape(len(x), -1, image.shape[-1]))

    def mask(self, path: str, x: Array) -> Array:
        """A hidden layer on each token."""
        hidden = self.activate(self.dense(f"{path}.fc1", x))
        return self.keep(path, self.dense(f"{path}.fc2", hidden))

    def fuse(self, path: str, y: Array, x: Array) -> Array:
        """Learned tokens onto the places of x: one place after another."""
        y = self.norm(f"{path}.norm1", y)
        y = self.dense(f"{path}.mix", y.swapaxes(1, 2)).swapaxes(1, 2)
        y = self.norm(f"{path}.norm2", y)
        shares = sigmoid(self.mask(f"{path}.mask", self.norm(f"{path}.norm", x)))
        fused = np.zeros_like(x)
        for place in range(x.shape[1]):
            for token in range(y.shape[1]):
                fused[:, place] += shares[:, place, token, None] * y[:, token]
        return self.keep(path, fused)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e⁻ˣ)."""
    return 1 / (1 + np.exp(-x))


@st.composite
def scenic_models(draw: st.DrawFn) -> Pair:
    """Scenic's TokenLearnerViT: square grids, both modules, with fusers or without."""
    (height, width), side, channels = draw(patches), draw(st.integers(1, 3)), draw(channel_counts)
    depth, heads = draw(st.integers(1, 3)), draw(head_counts)
    dim, mlp_dim, tokens = draw(divisible(heads)), draw(widths), draw(st.integers(1, 4))
    loc, num_classes = draw(st.integers(0, depth - 1)), draw(classes)
    use_tokenfuse, use_v11 = draw(st.booleans()), draw(st.booleans())
    config = TokenLearnerConfig(
        image_size=(side * height, side * width), patch_size=(height, width),
        in_channels=channels, preprocess=statistics(channels), num_classes=num_classes,
        embed_dim=dim, depth=depth, num_heads=heads, mlp_dim=mlp_dim,
        learner="mlp" if use_v11 else "conv", learner_loc=loc, learned_tokens=tokens,
        fuser=use_tokenfuse,
    )  # fmt: skip
    untold = () if use_tokenfuse else ("learner_loc",)
    return Pair({"sizes": scenic_sizes(config)}, config, untold)


def scenic_sizes(config: TokenLearnerConfig) -> scenic.Sizes:
    """Scenic's arguments for a config that it can hold."""
    return scenic.Sizes(
        patches=config.patch_size, grid=config.grid, channels=config.in_channels,
        hidden_size=config.embed_dim, num_layers=config.depth, num_heads=config.num_heads,
        mlp_dim=config.mlp_dim, num_tokens=config.learned_tokens,
        tokenlearner_loc=config.learner_loc, use_tokenfuse=config.fuser,
        use_v11=config.learner == "mlp", num_classes=config.num_classes,
    )  # fmt: skip


ORIGINALS: dict[str, Original] = {}


# What each format can hold


def scenic_fields(_: st.DrawFn, config: TokenLearnerConfig) -> Fields:
    """A TokenLearner before some block, a head, a square grid; heads that fill the width."""
    depth, side = max(config.depth, 1), config.grid[0]
    (height, width), heads = config.patch_size, config.num_heads
    return dict(
        image_size=(side * height, side * width), depth=depth, head_dim=None,
        embed_dim=-(-config.embed_dim // heads) * heads, mlp_output_activation=False,
        learner="mlp" if config.learner == "none" else config.learner, learner_pool="sum",
        learner_loc=min(config.learner_loc, depth - 1), bottleneck_dim=scenic.BOTTLENECK,
        num_classes=config.num_classes or 1,
    )  # fmt: skip


FITS = {"scenic": Fit(scenic_fields)}

PARAMETERS = {
    "token_learner_ti16": (5_730_808, 5_730_792),
    "token_learner_s16": (22_076_344, 22_076_328),
    "token_learner_b16": (86_617_912, 86_617_896),
    "token_learner_l16": (304_393_272, 304_393_256),
    "token_learner_b16_v1": (86_685_160, 86_685_160),
    "token_learner_b16_fuser": (86_886_904, 86_886_808),
    "token_learner_mini": (1_344_650, 1_344_650),
    "token_learner_mini_4": (1_349_946, 1_349_946),
    "token_learner_mini_8": (1_355_850, 1_355_850),
}
"""Total and trainable: of the official models by the shapes in ``oracles.scenic``, of the Keras
example's as stock layers have them; ``test_token_learner`` counts both. Biases that a softmax or a
norm takes away again do not train here."""
