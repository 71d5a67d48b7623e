"""Cityscapes as most multi-task papers use it: Cordts et al., CVPR 2016, in the files of Liu et al. (MTAN), CVPR 2019.

2,975 training and 500 test images of 128x256 (also published at 256x512); 7 or 19 classes and a depth map. MTAN's
folder val/ is the test split of all published tables. There are no validation images.

**The depth map is disparity**: Cityscapes' 16-bit numbers divided by 65,535, large where things are near, and 0 where
there is no label. So the relative error has tiny denominators. The 27.77 of published tables is no percentage.

Where a crop is shown s times larger, all things look s times nearer, and disparity must be multiplied by s. The code
behind the published tables (CAGrad, FAMO, FairGrad) divides by s, as if the map held metres. `depth_scaling=divide`
does the same, for comparable numbers; `multiply` is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Ge

from mtl.data import npy
from mtl.data.base import Benchmark, Split
from mtl.data.inputs import Image
from mtl.data.npy import Layout, MapKind
from mtl.metrics.dense import Reduction
from mtl.tasks import Depth, Disparity, Segmentation, Task
from mtl.views import Augment, Flip, ScaleCrop


@dataclass
class Cityscapes(Benchmark):
    """Classes and disparity of street scenes.

    Args:
        root: the folder that holds train/ and val/, or cityscapes2/ (128x256) or cityscapes/ (256x512) with both.
        cache: folder for the decoded arrays, about 0.8 GB at 128x256; None for mtl-cache/ beside the data.
        height, width: of the images in the files; None takes any size. Say it where there are several: only what is
            said here is a part of a run's identity.
        augmented: whether training images are cropped, enlarged and flipped; LibMTL's tables are without.
        classes: 7 reads label_7/ (or label/, LibMTL's name for it), 19 reads label_19/.
        depth_scaling: what the augmentation does to the map where a crop is shown s times larger. divide: by s, as the
            published tables did. multiply: by s, as is right for disparity.
        reduction: how the metrics of depth combine batches. pooled: over all pixels, as LibMTL. batch_mean: the mean of
            each batch's value, as CAGrad, Nash-MTL, FAMO and FairGrad with batches of eight images.
    """

    batch_size: Annotated[int, Ge(1)] = 8
    eval_batch_size: Annotated[int, Ge(1)] = 50
    root: str = "data"
    cache: str | None = None
    height: Annotated[int, Ge(1)] | None = None
    width: Annotated[int, Ge(1)] | None = None
    augmented: bool = True
    classes: Literal[7, 19] = 7
    depth_scaling: Literal["divide", "multiply"] = "divide"
    reduction: Reduction = "pooled"

    @cached_property
    def tasks(self) -> Sequence[Task]:
        depth = Depth if self.depth_scaling == "divide" else Disparity
        return Segmentation("segmentation", self.classes), depth("depth", reduction=self.reduction)

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, *self.layout.picture(self.root, self.height, self.width)))}

    @property
    def layout(self) -> Layout:
        """Where the files are, and how they become columns."""
        labels = ("label_7", "label") if self.classes == 7 else ("label_19",)
        return Layout(
            name="Cityscapes",
            subfolders=("cityscapes2", "cityscapes"),
            kinds={
                "image": MapKind(("image",), npy.image),
                "segmentation": MapKind(labels, npy.classes(self.classes)),
                "depth": MapKind(("depth",), npy.depth),
            },
            sizes={"train": 2975, "test": 500},
            source="the field gets cityscapes2.zip (128x256) from the README of https://github.com/lorenmt/mtan",
        )

    @property
    def augment(self) -> Sequence[Augment]:
        return (ScaleCrop((1.0, 1.2, 1.5)), Flip()) if self.augmented else ()

    def load(self) -> dict[str, Split]:
        return self.layout.load(self.root, self.cache)
