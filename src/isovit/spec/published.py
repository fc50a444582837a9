"""What the authors of a model say of it: figures with their source, never computed here."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Figures of one variant, as printed.

    Attributes:
        source: paper with its table, or the page of the repository.
        top1: accuracy on ImageNet-1k's validation images, in per cent.
        image_size: side of the images of that accuracy, in pixels.
        gmacs: multiply-adds of one image of the variant's own size, in 10⁹, as a text: its digits
            say how it was rounded.
        gmacs_note: why they are not those of the spec; empty where they are.
    """

    source: str
    top1: float | None = None
    image_size: int = 224
    gmacs: str | None = None
    gmacs_note: str = ""
