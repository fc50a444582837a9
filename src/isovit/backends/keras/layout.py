"""How Keras names and orders parameters; data only."""

from isovit.spec.layout import CANONICAL, Layout, Leaf
from isovit.spec.param import Role

LAYOUT: Layout = {
    **CANONICAL,
    Role.DEPTHWISE_KERNEL: Leaf("kernel", "h w o i"),
    Role.NORM_SCALE: Leaf("gamma", "c"),
    Role.NORM_BIAS: Leaf("beta", "c"),
    Role.NORM_MEAN: Leaf("moving_mean", "c"),
    Role.NORM_VAR: Leaf("moving_variance", "c"),
}
