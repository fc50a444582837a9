"""How Keras names and orders parameters; data only."""

from isovit.spec.layout import CANONICAL, Layout, Leaf
from isovit.spec.param import Role

LAYOUT: Layout = {
    **CANONICAL,
    Role.NORM_SCALE: Leaf("gamma", "c"),
    Role.NORM_BIAS: Leaf("beta", "c"),
}
