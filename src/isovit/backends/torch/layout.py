"""How PyTorch names and orders parameters; data only."""

from isovit.spec.layout import Layout, Leaf
from isovit.spec.param import Role

LAYOUT: Layout = {
    Role.DENSE_KERNEL: Leaf("weight", "o i"),
    Role.CONV_KERNEL: Leaf("weight", "o i h w"),
    Role.BIAS: Leaf("bias", "o"),
    Role.NORM_SCALE: Leaf("weight", "c"),
    Role.NORM_BIAS: Leaf("bias", "c"),
    Role.OWN: Leaf("", ""),
}
