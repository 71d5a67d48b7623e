"""Average precision of detected boxes, and what it needs: overlaps, decoding, suppression.

Everything has static shapes, so that the host never waits for the device. A box is (x1, y1, x2, y2) in pixels.

Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010 (AP at an IoU of 0.5); Lin et al.,
"Microsoft COCO", ECCV 2014 (the mean over the IoUs 0.5, 0.55, …, 0.95, with 101 recalls and 100 detections per image).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.base import Metric, Score

THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))
MOST = 100  # detections per image, as in COCO
CANDIDATES = 300  # pairs of anchor and class before suppression
OVERLAP = 0.5  # of two boxes of one class: the less certain one is suppressed
EDGE, BINS = 8.0, 800  # logits from −8 to 8 in steps of 0.02
LONGEST = math.log(1000 / 16)  # of a predicted log of width or height, as in Faster R-CNN's code


class Detections(NamedTuple):
    """A prediction of boxes, as a detection network makes it. Only the task and its metric read it.

    Attributes:
        classes: (N, A, C) logits of each anchor.
        offsets: (N, A, 4) from the anchor to its box, see `encode`.
        anchors: (N, A, 4) boxes in pixels, the same for every sample: a view without memory of its own.
    """

    classes: Tensor
    offsets: Tensor
    anchors: Tensor


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """(…, A, B) intersection over union of boxes (…, A, 4) and (…, B, 4); 0 if both are empty."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    union = areas[0][..., :, None] + areas[1][..., None, :] - shared
    return shared / union.clamp(min=1e-9)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(…, 4) offsets from anchors to boxes: centre in the anchor's size, log of the ratio of sizes (Faster R-CNN)."""
    (centre, size), (middle, extent) = _centred(boxes), _centred(anchors)
    return torch.cat([(centre - middle) / extent, (size / extent).log()], -1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """(…, 4) boxes at these offsets from their anchors: the inverse of `encode`."""
    middle, extent = _centred(anchors)
    centre, half = middle + offsets[..., :2] * extent, extent * offsets[..., 2:].clamp(max=LONGEST).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


class Found(NamedTuple):
    """Detected boxes, the most certain one first.

    Attributes:
        boxes: (N, K, 4).
        classes: (N, K) int64; −1 for none.
        logits: (N, K).
    """

    boxes: Tensor
    classes: Tensor
    logits: Tensor


def detect(prediction: Detections, most: int = MOST) -> Found:
    """The boxes of each image, after suppression within each class. K is `most`, or less with few anchors."""
    logits, anchors, offsets = prediction.classes.float(), prediction.anchors, prediction.offsets
    classes = logits.shape[2]
    # An anchor may be of several classes: its candidates are pairs.
    best, index = logits.flatten(1).topk(min(CANDIDATES, logits[0].numel()), 1)
    place, kind = (index // classes)[..., None].expand(-1, -1, 4), index % classes
    boxes = decode(offsets.gather(1, place).float(), anchors.gather(1, place).float())
    alive = keep(boxes, kind, OVERLAP) & ~best.isnan()
    alive &= alive.cumsum(1) <= most
    # A stable sort brings the survivors to the front, in their order.
    order = (~alive).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    kind = kind.masked_fill(~alive, -1).gather(1, order)
    return Found(boxes.gather(1, order[..., None].expand(-1, -1, 4)), kind, best.gather(1, order))


def keep(boxes: Tensor, kind: Tensor, overlap: float) -> Tensor:
    """(N, K) bool, which boxes stay: not those that overlap a more certain one of their class that stays.

    Args:
        boxes: (N, K, 4), the most certain first.
        kind: (N, K) classes.
        overlap: the greatest IoU that is allowed.
    """
    near = (overlaps(boxes, boxes) > overlap) & (kind[:, :, None] == kind[:, None, :])
    alive = torch.ones_like(kind, dtype=torch.bool)
    for i in range(boxes.shape[1] - 1):
        # Whatever stands before i is decided. If i stays, it suppresses its later neighbours.
        alive[:, i + 1 :] &= ~(near[:, i, i + 1 :] & alive[:, i : i + 1])
    return alive


def hits(found: Found, truth: Tensor) -> Tensor:
    """(N, T, K) bool: whether each detection finds a true box, at each of COCO's T thresholds of IoU.

    As in COCO, the most certain detection chooses first, and takes the box of its class that it overlaps most.

    Args:
        truth: (N, M, 5) true boxes with class; −1 for none.
    """
    same = (found.classes[:, :, None] == truth[:, None, :, 4]) & (truth[:, None, :, 4] >= 0)
    near = overlaps(found.boxes, truth[..., :4].to(found.boxes.dtype)).masked_fill(~same, -1)
    limits = torch.arange(10, 20, device=near.device, dtype=near.dtype) * 0.05 - 1e-6
    free = torch.ones(len(truth), len(limits), truth.shape[1], dtype=torch.bool, device=near.device)
    right = []
    for k in range(near.shape[1]):
        best, which = near[:, k, None].masked_fill(~free, -1).max(2)
        right.append(best >= limits)
        taken = torch.zeros_like(free).scatter(2, which[..., None], right[-1][..., None])
        free &= ~taken
    return torch.stack(right, 2)


def padded(target: Any, most: int | None, dtype: torch.dtype) -> Tensor:
    """(N, M, 5) the true boxes of each image, filled up with −1; M is at least 1."""
    boxes = target.padded(most, -1.0).to(dtype)
    return boxes if boxes.shape[1] else F.pad(boxes, (0, 0, 0, 1), value=-1.0)


class AveragePrecision(Metric):
    """Area under the curve of precision over recall: mean over classes. `ap` is also the mean over COCO's ten IoUs.

    Only classes that occur in the labels count. The state counts detections by class, score and whether they are right:
    so it adds up over batches. Scores are counted in steps of 0.02 of the logit, between −8 and 8. Detections of one
    step count as equally certain; this is the only difference from COCO's own code.

    It is not measured on training batches, because suppression costs time.

    Args:
        classes: number of classes C. The state is (C, 11, 801) int64: for each class and step the right detections at
            each IoU, and all detections; in the last step's place, the number of true boxes.
        most: as in `tasks.Detection`.
    """

    scores = (Score("ap", "%", may_lack=True), Score("ap50", "%", may_lack=True))
    training = False

    def __init__(self, classes: int, most: int | None = None):
        self.classes, self.most = classes, most

    def zero(self) -> Tensor:
        return torch.zeros(self.classes, len(THRESHOLDS) + 1, BINS + 1, dtype=torch.int64)

    def update(self, state: Tensor, prediction: Detections, target: Any) -> None:
        found, truth = detect(prediction), padded(target, self.most, torch.float32)
        counted = (found.classes >= 0) & (target.lengths >= 0)[:, None]
        right = torch.cat([hits(found, truth), torch.ones_like(counted)[:, None]], 1) & counted[:, None]
        step = ((found.logits + EDGE) / (2 * EDGE) * BINS).long().clamp(0, BINS - 1)
        kind = found.classes.clamp(min=0)
        # (N, 11, K) numbers of the cells in the flattened state.
        row = torch.arange(right.shape[1], device=kind.device)[:, None]
        cell = (kind[:, None] * right.shape[1] + row) * (BINS + 1) + step[:, None]
        flat = state.view(-1)
        flat.index_add_(0, cell.flatten(), right.flatten().long())
        real = truth[..., 4] >= 0
        cell = (truth[..., 4].long().clamp(min=0) * right.shape[1] + right.shape[1] - 1) * (BINS + 1) + BINS
        flat.index_add_(0, cell.flatten(), real.flatten().long())

    def compute(self, state: Tensor) -> dict[str, float]:
        state = state.double()
        truths = state[:, -1, -1]
        occurs = truths > 0
        if not occurs.any():
            return {"ap": math.nan, "ap50": math.nan}
        # From the most certain step on: right ones, and all.
        sums = state[occurs][..., :-1].flip(-1).cumsum(-1)
        recall = sums[:, :-1] / truths[occurs][:, None, None]
        precision = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        # COCO's curve: at each recall, the best precision at this recall or a higher one; then a mean over 101 recalls.
        precision = precision.flip(-1).cummax(-1).values.flip(-1)
        wanted = torch.linspace(0, 1, 101, dtype=torch.float64).expand(*recall.shape[:2], -1).contiguous()
        place = torch.searchsorted(recall.contiguous(), wanted - 1e-9)
        reached = precision.gather(-1, place.clamp(max=BINS - 1)).masked_fill(place >= BINS, 0.0)
        by_threshold = 100 * reached.mean((0, 2))
        return {"ap": by_threshold.mean().item(), "ap50": by_threshold[0].item()}
