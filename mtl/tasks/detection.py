"""Detection: the boxes and classes of the objects in an image.

Lin et al., "Focal Loss for Dense Object Detection" (RetinaNet), ICCV 2017. A network predicts, for each of many fixed
boxes (anchors), the logits of all classes and the offsets to an object's box. `arch=retina` is such a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.base import Metric
from mtl.metrics.boxes import AveragePrecision, Detections, detect, encode, overlaps, padded
from mtl.tasks.base import Task
from mtl.tasks.dense import class_colours
from mtl.views import Boxes, Moves

POSITIVE, NEGATIVE = 0.5, 0.4  # IoU of an anchor with an object: from 0.5 it is one, below 0.4 it is background
ALPHA, GAMMA = 0.25, 2.0
DRAWN = 0.3  # least probability of a box that is drawn


@dataclass(frozen=True)
class Detection(Task):
    """Boxes of `outputs` classes: focal loss of the classes plus L1 loss of the offsets, for each image.

    The prediction is a `mtl.metrics.boxes.Detections`. The target is a ragged column with rows (x1, y1, x2, y2, class)
    in pixels. An image of length 0 is labelled and has no object: all its anchors are background. An image of
    length −1 is not labelled. A row of class −1 is no box; a crop leaves such rows.

    Both losses are divided by the image's number of positive anchors, at least 1, as in torchvision. So one image is
    one unit.

    Attributes:
        most: rows of the longest image; None for those of the batch. With a number, all batches have one shape.
    """

    most: int | None = None

    moves: ClassVar[Moves] = Boxes()

    @property
    def metrics(self) -> Sequence[Metric]:
        return (AveragePrecision(self.outputs, self.most),)

    @property
    def allowed(self) -> str:
        return (
            f"a ragged column with rows (x1, y1, x2, y2, class) is needed: x1 < x2, y1 < y2, classes from 0 to "
            f"{self.outputs - 1}"
        )

    def wrong(self, target: Any) -> Tensor:
        ragged = hasattr(target, "lengths")
        if not ragged or target.values.shape[1:] != (5,):
            raise ValueError(f"shape {tuple((target.values if ragged else target).shape)}")
        if self.most is not None and len(target) and int(target.lengths.max()) > self.most:
            raise ValueError(f"an image has {int(target.lengths.max())} boxes, and most={self.most}")
        values = target.values.float()
        kind = values[:, 4]
        no_class = (kind != kind.round()) | (kind < 0) | (kind >= self.outputs)
        flat = values[:, 2:4] <= values[:, :2]
        bad = ~values.isfinite()
        bad[:, 2:4] |= flat
        bad[:, 4] |= no_class
        return bad

    def units(self, target: Any) -> Tensor:
        return (target.lengths >= 0).long()

    def criterion(self, prediction: Detections, target: Any) -> Tensor:
        self._check(prediction)
        logits, offsets, anchors = prediction
        boxes = padded(target, self.most, anchors.dtype)
        match, ignored = matches(anchors, boxes)
        labelled = (target.lengths >= 0)[:, None]
        positive = (match >= 0) & labelled
        # Filled before the loss: a NaN that is masked afterwards would come back in the gradient.
        counted = labelled & ~ignored
        logits = logits.masked_fill(~counted[..., None], 0.0)
        offsets = offsets.masked_fill(~positive[..., None], 0.0)
        own = boxes.gather(1, match.clamp(min=0)[..., None].expand(-1, -1, 5))
        kinds = torch.arange(self.outputs, device=logits.device)
        wanted = ((own[..., 4:] == kinds) & positive[..., None]).to(logits.dtype)
        classes = focal_loss(logits, wanted).masked_fill(~counted[..., None], 0.0).sum((1, 2))
        # Background gets its own anchor as target, whose offsets are 0.
        aim = encode(torch.where(positive[..., None], own[..., :4], anchors), anchors)
        place = (offsets - aim).abs().sum((1, 2))
        return (classes + place) / positive.sum(1).clamp(min=1)

    def _check(self, prediction: Any) -> None:
        if not isinstance(prediction, Detections):
            raise ValueError(
                f"{self.name} needs mtl.metrics.boxes.Detections, and the model predicts a "
                f"{type(prediction).__name__}; a network with anchors is needed, such as arch=retina"
            )
        if prediction.classes.shape[2:] != (self.outputs,):
            shape = tuple(prediction.classes.shape)
            raise ValueError(f"{self.name} has {self.outputs} classes, but the model predicts the shape {shape}")

    def answers(self, prediction: Detections) -> dict[str, Tensor]:
        """Up to 100 boxes (N, K, 4) in pixels, the most certain first, with class and probability (N, K).

        A class of −1 is none.
        """
        found = detect(prediction)
        none = found.classes < 0
        return {
            "box": found.boxes.masked_fill(none[..., None], 0.0),
            "class": found.classes,
            "probability": found.logits.sigmoid().masked_fill(none, 0.0),
        }

    def draw(self, images: Tensor | None, prediction: Detections, target: Any) -> tuple[Tensor, Tensor] | None:
        """The boxes on the images, one colour for each class: the true ones, and those of a probability from 0.3.

        The truth of an image without labels is black, and that of an image without objects is the image itself.
        """
        if images is None:
            return None
        found = detect(prediction)
        sure = found.classes.masked_fill(found.logits.sigmoid() < DRAWN, -1)
        truth = padded(target, self.most, torch.float32)
        colours = class_colours(self.outputs).to(images.device)
        pairs = (truth[..., :4], truth[..., 4].long()), (found.boxes, sure)
        true, drawn = (_framed(images, boxes, kind, colours) for boxes, kind in pairs)
        return true * self.labelled(target)[:, None, None, None], drawn


def matches(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The true box of each anchor.

    An anchor belongs to the box that it overlaps most, if their IoU is at least 0.5. Every box also gets the anchors
    that overlap it most; these belong to the box that they overlap most themselves, as in torchvision's code.

    Args:
        anchors: (N, A, 4).
        boxes: (N, M, 5), class −1 for none.

    Returns:
        (N, A) the number of the box, −1 for none; (N, A) bool, whether the anchor counts neither as an object nor as
        background.
    """
    near = overlaps(anchors, boxes[..., :4]).masked_fill((boxes[..., 4] < 0)[:, None], -1.0)
    best, which = near.max(2)
    nearest = ((near == near.amax(1, keepdim=True)) & (near > 0)).any(2)
    positive = (best >= POSITIVE) | nearest
    return which.masked_fill(~positive, -1), (best >= NEGATIVE) & ~positive


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """α (1 − p)^γ times the binary cross-entropy, where p is the probability of the right answer; α is 1/4 for yes.

    Args:
        logits: of any shape.
        wanted: 0 or 1, of the same shape.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p = logits.sigmoid()
    wrong = p + wanted - 2 * p * wanted  # 1 − probability of the right answer
    return (ALPHA * wanted + (1 - ALPHA) * (1 - wanted)) * wrong**GAMMA * entropy


def _framed(images: Tensor, boxes: Tensor, kind: Tensor, colours: Tensor) -> Tensor:
    """The images (N, H, W, 3) with the frames of boxes (N, K, 4); class −1 is none."""
    pictures, (height, width) = images.clone(), images.shape[1:3]
    for picture, own, kinds in zip(pictures, boxes.tolist(), kind.tolist(), strict=True):
        for (x1, y1, x2, y2), c in reversed(list(zip(own, kinds, strict=True))):  # the most certain one on top
            if c < 0:
                continue
            left, right = (min(max(round(x), 0), width - 1) for x in (x1, x2 - 1))
            top, bottom = (min(max(round(y), 0), height - 1) for y in (y1, y2 - 1))
            picture[[top, bottom], left : right + 1] = colours[c]
            picture[top : bottom + 1, [left, right]] = colours[c]
    return pictures
