"""How Flax names and orders parameters: canonically; data only."""

from isovit.spec.layout import CANONICAL, Layout

LAYOUT: Layout = CANONICAL
