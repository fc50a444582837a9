"""The Keras 3 backend: models as ``keras.Model`` on the engines tensorflow, jax and torch."""
