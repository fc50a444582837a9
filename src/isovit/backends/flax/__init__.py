"""The Flax (NNX) backend: models as ``flax.nnx.Module``."""
