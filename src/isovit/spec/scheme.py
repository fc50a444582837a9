"""The published ways to initialise, as a table of initialisers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isovit.spec.config import InitScheme
from isovit.spec.param import ZEROS, Init

TRUNC_NORMAL = Init("trunc_normal", 0.02)


@dataclass(frozen=True)
class Scheme:
    """A published way to initialise; each method gives the initialiser of one kind of parameter.

    ``timm``: trunc_normal(0.02) for every dense kernel, zeros for biases, torch's default for the
    patch convolution, class token normal(1e-6) (timm ``init_weights_vit_timm``).
    ``yitu``: the same with trunc_normal(0.02) for the class token (T2T-ViT ``_init_weights``).
    ``vit_pytorch``: torch's defaults, U(±1/√in) for kernels and biases; tokens, positions N(0, 1).
    ``vit_jax``: xavier_uniform kernels, MLP biases normal(1e-6), head and class token zeros,
    positions normal(0.02); the patch convolution lecun_normal, Flax's default.
    """

    name: InitScheme

    def dense_kernel(self, in_dim: int, out_dim: int) -> Init:
        """Kernel of a dense layer."""
        if self.name == "vit_jax":
            return Init("uniform", math.sqrt(6 / (in_dim + out_dim)))
        return self._torch_default(in_dim) if self.name == "vit_pytorch" else TRUNC_NORMAL

    def dense_bias(self, in_dim: int) -> Init:
        """Bias of a dense layer of ``in_dim`` inputs."""
        return self._torch_default(in_dim) if self.name == "vit_pytorch" else ZEROS

    def mlp_bias(self, in_dim: int) -> Init:
        """Bias of a dense layer of an MLP."""
        return Init("normal", 1e-6) if self.name == "vit_jax" else self.dense_bias(in_dim)

    def head_kernel(self, in_dim: int, out_dim: int) -> Init:
        """Kernel of the classifier."""
        return ZEROS if self.name == "vit_jax" else self.dense_kernel(in_dim, out_dim)

    def conv_kernel(self, fan_in: int) -> Init:
        """Kernel of a convolution; ``fan_in`` is kernel area times input channels."""
        if self.name == "vit_jax":
            return Init("lecun_normal", math.sqrt(1 / fan_in))
        return self._torch_default(fan_in)

    def conv_bias(self, fan_in: int) -> Init:
        """Bias of such a convolution."""
        return ZEROS if self.name == "vit_jax" else self._torch_default(fan_in)

    def class_token(self) -> Init:
        """The class token."""
        return {
            "timm": Init("normal", 1e-6),
            "yitu": TRUNC_NORMAL,
            "vit_pytorch": Init("normal", 1.0),
            "vit_jax": ZEROS,
        }[self.name]

    def positions(self) -> Init:
        """A learned table of positions."""
        return {
            "timm": TRUNC_NORMAL,
            "yitu": TRUNC_NORMAL,
            "vit_pytorch": Init("normal", 1.0),
            "vit_jax": Init("normal", 0.02),
        }[self.name]

    @staticmethod
    def _torch_default(fan_in: int) -> Init:
        return Init("uniform", 1 / math.sqrt(fan_in))
