"""Augmentation: random views (crop, flip, scale) of images, and how label maps follow their image."""

from mtl.views.moves import Boxes, Directions, Fixed, Metres, Moves, Picture, Pixels
from mtl.views.view import Augment, Crop, Flip, ScaleCrop, View

__all__ = [
    "Augment", "Boxes", "Crop", "Directions", "Fixed", "Flip", "Metres", "Moves", "Picture", "Pixels", "ScaleCrop",
    "View",
]  # fmt: skip
