"""NYUv2 as most multi-task papers use it: Silberman et al., ECCV 2012, in the files of Liu et al. (MTAN), CVPR 2019.

795 training and 654 test images of 288x384; 13 classes, depth in metres, surface normals. MTAN's folder val/ is the
official test split, and the one that all published tables are of. There are no validation images: papers that choose an
epoch or a rate by val/ choose by test data. `data.val_fraction=0.2` holds training images out instead.

Pixels without a label are −1 (class), 0 (depth) and (0, 0, 0) (normal) in the files. The images are not normalised.
Augmentation is MTAN's: a crop, shown 1, 1.2 or 1.5 times larger, depths divided by that, and a flip. See `mtl.views`
for what differs in detail: normals are taken from the nearest pixel, not mixed from four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from annotated_types import Ge

from mtl.data.base import Benchmark, Split
from mtl.data.inputs import Image
from mtl.data.npy import Layout, MapKind, classes, depth, image, normals
from mtl.metrics.dense import Reduction
from mtl.tasks import Depth, Normals, Segmentation, Task
from mtl.views import Augment, Flip, ScaleCrop

LAYOUT = Layout(
    name="NYUv2",
    subfolders=("nyuv2",),
    kinds={
        "image": MapKind(("image",), image),
        "segmentation": MapKind(("label",), classes(13)),
        "depth": MapKind(("depth",), depth),
        "normals": MapKind(("normal",), normals),
    },
    sizes={"train": 795, "test": 654},
    source="the field gets nyuv2.zip from the README of https://github.com/lorenmt/mtan",
)


@dataclass
class NYUv2(Benchmark):
    """Classes, depth and normals of indoor scenes.

    Args:
        root: the folder that holds train/ and val/, or nyuv2/ with both.
        cache: folder for the decoded arrays, about 3 GB; None for mtl-cache/ beside the data.
        height, width: of the images in the files; None takes any size. Say it where there are several: only what is
            said here is a part of a run's identity.
        augmented: whether training images are cropped, enlarged and flipped; LibMTL's tables are without.
        reduction: how the metrics of depth and normals combine batches. pooled: over all pixels, as LibMTL. batch_mean:
            the mean of each batch's value, as MTAN, CAGrad, Nash-MTL, FAMO and FairGrad with batches of two images.
    """

    batch_size: Annotated[int, Ge(1)] = 2
    eval_batch_size: Annotated[int, Ge(1)] = 8
    root: str = "data"
    cache: str | None = None
    height: Annotated[int, Ge(1)] | None = None
    width: Annotated[int, Ge(1)] | None = None
    augmented: bool = True
    reduction: Reduction = "pooled"

    @cached_property
    def tasks(self) -> Sequence[Task]:
        by = self.reduction
        return Segmentation("segmentation", 13), Depth("depth", reduction=by), Normals("normals", reduction=by)

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, *LAYOUT.picture(self.root, self.height, self.width)))}

    @property
    def augment(self) -> Sequence[Augment]:
        return (ScaleCrop((1.0, 1.2, 1.5)), Flip()) if self.augmented else ()

    def load(self) -> dict[str, Split]:
        return LAYOUT.load(self.root, self.cache)
