"""The table of objectives: what trains a model without being one that is asked for a class.

Each is a module here with a config class, ``VARIANTS`` and ``param_tree``, as a family is; its
config holds that of the model which it trains. An objective is called with images and with what
chance decides (masks, views) or others say (labels, a teacher's logits), and returns the loss of
each image: their mean is the loss of the batch.
"""

from __future__ import annotations

OBJECTIVES = {
    "mae": "MAE",
    "simmim": "SimMIM",
    "mpp": "MPP",
    "distill": "Distill",
    "dino": "DINO",
}
"""Objective name to the class name that its spec and models share."""
