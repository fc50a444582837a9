"""How PyTorch names and orders parameters; data only."""

from isovit.spec.layout import Layout, Leaf
from isovit.spec.param import Role

LAYOUT: Layout = {
    Role.DENSE_KERNEL: Leaf("weight", "o i"),
    Role.CONV_KERNEL: Leaf("weight", "o i h w"),
    Role.DEPTHWISE_KERNEL: Leaf("weight", "o i h w"),
    Role.BIAS: Leaf("bias", "o"),
    Role.NORM_SCALE: Leaf("weight", "c"),
    Role.NORM_BIAS: Leaf("bias", "c"),
    Role.NORM_MEAN: Leaf("running_mean", "c"),
    Role.NORM_VAR: Leaf("running_var", "c"),
    Role.OWN: Leaf("", ""),
}

COUNTER = "num_batches_tracked"
"""A BatchNorm's count of its batches, which no function depends on and only PyTorch keeps."""
