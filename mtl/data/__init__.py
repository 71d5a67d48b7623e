"""Data sets (one module each), what they are made of, and the batches that training draws from them."""

from mtl.data.base import Benchmark
from mtl.data.columns import Ragged, Split
from mtl.data.gather import from_dataset
from mtl.data.inputs import Image, Input, Numbers, Rows, Tokens
from mtl.data.pictures import from_files
from mtl.data.table import DataTable
from mtl.views import Augment, Crop, Flip, ScaleCrop

__all__ = [
    "Augment", "Benchmark", "Crop", "DataTable", "Flip", "Image", "Input", "Numbers", "Ragged", "Rows", "ScaleCrop",
    "Split", "Tokens", "from_dataset", "from_files",
]  # fmt: skip
