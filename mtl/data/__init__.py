"""Data sets (one module each), what they are made of, and the batches that training draws from them."""

from mtl.data.base import Benchmark
from mtl.data.columns import Ragged, Split
from mtl.data.inputs import Image, Input, Numbers, Rows
from mtl.views import Augment, Crop, Flip, ScaleCrop

__all__ = ["Augment", "Benchmark", "Crop", "Flip", "Image", "Input", "Numbers", "Ragged", "Rows", "ScaleCrop", "Split"]
