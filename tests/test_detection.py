"""Detection against torchvision's and pycocotools' code; boxes under crops; networks and data sets of boxes."""

import json
import math
import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shipped
import torch
import torchvision
import yaml
from PIL import Image as Pillow
from test_dense_tasks import NoWaiting
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator

from mtl.archs.model import HardSharing, count_macs, count_parameters
from mtl.archs.retina import Retina
from mtl.config import schema
from mtl.data.boxes import Shapes, draw_shapes
from mtl.data.coco import COCO
from mtl.data.columns import Ragged
from mtl.data.draws import Draws
from mtl.data.pets import Pets
from mtl.engine.loaded import load
from mtl.errors import SetupError
from mtl.metrics.boxes import AveragePrecision, Detections, decode, detect, encode, keep, overlaps
from mtl.predict import _flat, write
from mtl.random import stream
from mtl.tasks import Detection
from mtl.tasks.detection import focal_loss, matches
from mtl.tasks.predictions import each
from mtl.views import Boxes, Crop, Flip, ScaleCrop, View
from mtl.views.moves import see

C, SIZE = 3, 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    corner, side = (torch.rand(*shape, 2, generator=generator(seed + i)) * n for i, n in enumerate((40, 30)))
    return torch.cat([corner, corner + side + 4], -1)


def labels(*numbers: int, seed: int = 0) -> Ragged:
    """Boxes of images with these numbers of objects; −1 for an image without a label."""
    lengths = torch.tensor(numbers)
    many = int(lengths.clamp(min=0).sum())
    kinds = torch.randint(C, (many, 1), generator=generator(seed + 7)).float()
    return Ragged(torch.cat([random_boxes(many, seed=seed), kinds], 1), lengths)


def prediction(size: int, anchors: int = 50, seed: int = 3) -> Detections:
    draws = generator(seed)
    logits = torch.randn(size, anchors, C, generator=draws) * 2
    offsets = torch.randn(size, anchors, 4, generator=draws) * 0.3
    return Detections(logits, offsets, random_boxes(anchors, seed=seed).expand(size, -1, -1))


def near(prediction: Detections, target: Ragged) -> Detections:
    """Every second anchor is moved close to a true box, so that there are hits at every IoU."""
    anchors = prediction.anchors.clone()
    for n, length in enumerate(target.lengths.tolist()):
        if length > 0:
            own = target[n][torch.arange(25) % length, :4]
            anchors[n, ::2] = own + torch.randn(25, 4, generator=generator(n))
    return prediction._replace(anchors=anchors, offsets=prediction.offsets * 0.1)


# --------------------------------------------------------------------------------------------------------------- losses


def test_geometry_is_torchvisions():
    a, b = random_boxes(20), random_boxes(30, seed=5)
    torch.testing.assert_close(overlaps(a, b), torchvision.ops.box_iou(a, b))
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(encode(a, b[:20]), coder.encode_single(a, b[:20]))
    offsets = torch.randn(30, 4, generator=generator())
    offsets[0, 2:] = 50  # far too large: both clamp it
    torch.testing.assert_close(decode(offsets, b), coder.decode_single(offsets, b), rtol=1e-4, atol=1e-3)


def test_matches_are_torchvisions_matcher():
    anchors, truth = random_boxes(300), random_boxes(5, seed=5)
    boxes = torch.cat([torch.cat([truth, torch.ones(5, 1)], 1), torch.full((3, 5), -1.0)])
    found, ignored = (one[0] for one in matches(anchors[None], boxes[None]))
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=True)(torchvision.ops.box_iou(truth, anchors))
    assert (expected == -2).any() and (expected >= 0).sum() > 5
    assert torch.equal(found, expected.clamp(min=-1))
    assert torch.equal(ignored, expected == -2)


def test_no_anchor_is_given_to_a_box_that_touches_none():
    """torchvision's matcher gives all of them to it."""
    boxes = torch.tensor([[[200.0, 200, 210, 210, 1]]])
    assert (matches(random_boxes(1, 30), boxes)[0] == -1).all()


def test_focal_loss_is_torchvisions():
    logits = torch.randn(50, generator=generator()) * 5
    wanted = (torch.arange(50) % 3 == 0).float()
    torch.testing.assert_close(focal_loss(logits, wanted), torchvision.ops.sigmoid_focal_loss(logits, wanted))


def by_hand(task: Detection, found: Detections, target: Ragged) -> Tensor:
    """(N,) torchvision's RetinaNet, image by image."""
    losses = []
    for n, length in enumerate(target.lengths.tolist()):
        if length < 0:
            losses.append(torch.zeros(()))
            continue
        logits, offsets, anchors = (part[n] for part in found)
        own = target[n]
        match = torch.full((len(anchors),), -1)
        if length:
            match = Matcher(0.5, 0.4, True)(torchvision.ops.box_iou(own[:, :4], anchors))
        positive = match >= 0
        wanted = torch.zeros_like(logits)
        wanted[positive, own[match[positive], 4].long()] = 1
        loss = torchvision.ops.sigmoid_focal_loss(logits[match != -2], wanted[match != -2], reduction="sum")
        aim = BoxCoder((1.0,) * 4).encode_single(own[match[positive], :4], anchors[positive])
        loss = loss + (offsets[positive] - aim).abs().sum()
        losses.append(loss / max(1, int(positive.sum())))
    return torch.stack(losses)


@pytest.mark.parametrize("most", [None, 6])
def test_loss_is_retinanets_image_by_image(most):
    """An image without objects is background; an image without a label adds nothing, not even a NaN's gradient."""
    target, task = labels(4, 0, -1, 1), Detection("boxes", C, most=most)
    found = near(prediction(4), target)
    assert task.units(target).tolist() == [1, 1, 0, 1]
    torch.testing.assert_close(task.criterion(found, target), by_hand(task, found, target))
    logits = found.classes.clone()
    logits[2] = math.nan
    leaf = logits.requires_grad_()
    task.loss(found._replace(classes=leaf), target).backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[2].any() and leaf.grad[1].any()
    only_empty = labels(0, 0)
    torch.testing.assert_close(task.criterion(prediction(2), only_empty), by_hand(task, prediction(2), only_empty))


def test_rows_of_class_minus_one_are_no_boxes():
    target, task = labels(3, 2), Detection("boxes", C)
    found = near(prediction(2), target)
    values = target.values.clone()
    values[1, 4] = values[4, 4] = -1
    fewer = Ragged(target.values[[0, 2, 3]], torch.tensor([2, 1]))
    torch.testing.assert_close(task.criterion(found, target.with_values(values)), task.criterion(found, fewer))
    metric = task.metrics[0]
    states = [metric.zero(), metric.zero()]
    metric.update(states[0], found, target.with_values(values))
    metric.update(states[1], found, fewer)
    assert torch.equal(*states)


def test_wrong_boxes_and_predictions_are_named():
    task = Detection("boxes", C, most=2)
    rows = torch.tensor(
        [[0.0, 0, 4, 4, 1], [4, 0, 4, 4, 1], [0, 0, 4, math.nan, 1], [0, 0, 4, 4, 3], [0, 0, 4, 4, 0.5]]
    )
    assert task.wrong(Ragged(rows, torch.tensor([1] * 5))).any(1).tolist() == [False, True, True, True, True]
    with pytest.raises(ValueError, match="an image has 5 boxes, and most=2"):
        task.wrong(Ragged(rows, torch.tensor([5])))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        task.wrong(torch.zeros(4))
    with pytest.raises(ValueError, match=r"boxes needs .*Detections, and the model predicts a Tensor; .* arch=retina"):
        task.criterion(torch.zeros(4, 3), labels(1, 1, 1, 1))


# --------------------------------------------------------------------------------------------------------------- metric


def test_suppression_is_torchvisions():
    boxes, kinds = random_boxes(2, 80), torch.randint(C, (2, 80), generator=generator())
    scores = torch.arange(80, 0, -1).float()
    for own, kind, alive in zip(boxes, kinds, keep(boxes, kinds, 0.5), strict=True):
        expected = torchvision.ops.batched_nms(own, scores, kind, 0.5)
        assert 10 < len(expected) < 80
        assert alive.nonzero().flatten().tolist() == expected.sort().values.tolist()


def test_detections_are_sorted_limited_and_minus_one_where_there_is_none():
    found = detect(prediction(2), most=5)
    assert found.boxes.shape == (2, 5, 4) and (found.classes >= 0).all()
    assert (found.logits.diff(dim=1) <= 0).all()
    same = prediction(1)
    same = same._replace(offsets=same.offsets * 0, anchors=same.anchors[:, :1].expand(-1, 50, -1))
    assert (detect(same).classes[0] >= 0).sum() == C  # all anchors lie upon each other: one box of each class is left


def average_precision(found: Detections, target: Ragged) -> tuple[float, float]:
    """COCO's AP by plain loops, in its own order of operations: classes, thresholds, images, detections."""
    results, shown = [], detect(found)
    scores = ((shown.logits + 8) / 0.016 / 1.25).long().clamp(0, 799)
    for c in range(C):
        truths = [target[n][target[n][:, 4] == c][:, :4] for n in range(len(target))]
        total = sum(len(own) for own, length in zip(truths, target.lengths, strict=True) if length >= 0)
        if not total:
            continue
        row = []
        for threshold in [0.5 + 0.05 * i for i in range(10)]:
            events = []
            for n, own in enumerate(truths):
                if target.lengths[n] < 0:
                    continue
                free = set(range(len(own)))
                for box, kind, score in zip(shown.boxes[n], shown.classes[n], scores[n], strict=True):
                    if kind != c:
                        continue
                    ious = {i: float(torchvision.ops.box_iou(box[None], own[i : i + 1])) for i in free}
                    best = max(ious, key=ious.get, default=None)
                    right = best is not None and ious[best] >= threshold - 1e-6
                    free -= {best} if right else set()
                    events.append((int(score), right))
            curve = []  # after each step of scores: recall and precision
            for step in sorted({s for s, _ in events}, reverse=True):
                seen = [right for s, right in events if s >= step]
                curve.append((sum(seen) / total, sum(seen) / len(seen)))
            at = [max((p for r, p in curve if r >= q - 1e-9), default=0.0) for q in np.linspace(0, 1, 101)]
            row.append(100 * sum(at) / 101)
        results.append(row)
    return float(np.mean(results)), float(np.mean(results, 0)[0])


def measured(found: Detections, target: Ragged, parts: list[slice]) -> dict[str, float]:
    metric = AveragePrecision(C)
    state = metric.zero()
    for part in parts:
        one = metric.zero()
        metric.update(one, Detections(*(tensor[part] for tensor in found)), target[part])
        state += one
    return metric.compute(state)


def test_average_precision_by_hand_and_in_parts():
    target = labels(4, 0, -1, 1, 6, 3)
    found = near(prediction(6), target)
    whole = measured(found, target, [slice(0, 6)])
    assert 5 < whole["ap"] < whole["ap50"] < 95
    assert (whole["ap"], whole["ap50"]) == pytest.approx(average_precision(found, target))
    assert measured(found, target, [slice(0, 2), slice(2, 3), slice(3, 6)]) == whole
    assert math.isnan(measured(prediction(2), labels(0, -1), [slice(0, 2)])["ap"])


def test_average_precision_of_pycocotools():
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools.cocoeval import COCOeval

    target = labels(*[3, 5, 0, 2, 7, 1] * 4)
    found = near(prediction(24), target)
    shown = detect(found)
    truth = coco.COCO()
    boxes = [(n, *row) for n in range(24) for row in target[n].tolist()]
    annotations = [{"id": i + 1, "image_id": n, "category_id": int(c), "iscrowd": 0, "area": (x2 - x1) * (y2 - y1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1]} for i, (n, x1, y1, x2, y2, c) in enumerate(boxes)]  # fmt: skip
    truth.dataset = {"info": {}, "images": [{"id": n} for n in range(24)], "annotations": annotations,
                     "categories": [{"id": c} for c in range(C)]}  # fmt: skip
    truth.createIndex()
    rows = [[n, x1, y1, x2 - x1, y2 - y1, s, c] for n in range(24) for (x1, y1, x2, y2), s, c in
            zip(shown.boxes[n].tolist(), shown.logits[n].tolist(), shown.classes[n].tolist(), strict=True)
            if c >= 0]  # fmt: skip
    evaluation = COCOeval(truth, truth.loadRes(np.array(rows)), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    values = measured(found, target, [slice(0, 24)])
    # Scores are counted in steps, so a few detections change places.
    assert values["ap"] == pytest.approx(100 * evaluation.stats[0], abs=0.3)
    assert values["ap50"] == pytest.approx(100 * evaluation.stats[1], abs=0.3)


def test_neither_loss_nor_metric_nor_moves_wait_for_the_device():
    target = labels(3, 0, -1, 2)
    task, found = Detection("boxes", C), near(prediction(4), target)
    found = found._replace(classes=found.classes.requires_grad_())
    view = Draws(4, 4, (ScaleCrop(), Flip()), (SIZE, SIZE)).view(0, 0, torch.arange(4))
    state = task.metrics[0].zero()
    with NoWaiting():
        moved = task.moves(target, None, view)
    # Padding reads the longest length, which is on the host.
    boxes = moved.padded(None, -1.0)
    known = SimpleNamespace(lengths=moved.lengths, padded=lambda most, fill: boxes)
    with NoWaiting():
        task.loss(found, known).backward()
        task.metrics[0].update(state, Detections(*(part.detach() for part in found)), known)


def test_answers_and_pictures():
    target, task = labels(2, -1), Detection("boxes", C)
    found = near(prediction(2), target)
    answers = task.answers(found)
    assert {name: tuple(value.shape[:1]) for name, value in answers.items()} == dict.fromkeys(answers, (2,))
    assert ((answers["class"] < 0) == (answers["probability"] == 0)).all()
    images = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    truth, drawn = task.draw(images, found, target)
    assert truth[0].any() and not truth[1].any() and drawn.any() and not images.any()
    x1, y1, *_ = target.values[1].round().int().tolist()
    assert truth[0, y1, x1].any()
    assert task.draw(None, found, target) is None
    white = torch.full_like(images, 255)
    assert task.draw(white, found, labels(2, 0))[0][1].eq(255).all()  # no object
    assert not task.draw(white, found, target)[0][1].any()  # no label


# -------------------------------------------------------------------------------------------------------- views, forms


@pytest.mark.parametrize("augment", [Flip(), Crop(20), ScaleCrop((1.2, 1.5)), (ScaleCrop((1.0, 1.5)), Flip(), Crop(9))])
def test_boxes_follow_their_image(augment):
    """A white box in a black image is, after any view, exactly where the moved box says."""
    chain = augment if isinstance(augment, tuple) else (augment,)
    target = labels(*[1] * 32)
    target = target.with_values(target.values.round().clamp(max=SIZE))
    view = Draws(32, 8, chain, (SIZE, SIZE)).view(0, 0, torch.arange(32))
    moved = Boxes()(target, None, view)
    assert torch.equal(moved.lengths, target.lengths)
    images = torch.zeros(32, SIZE, SIZE)
    for image, (x1, y1, x2, y2, _) in zip(images, target.values.int().tolist(), strict=True):
        image[y1:y2, x1:x2] = 1
    gone = 0
    for image, (x1, y1, x2, y2, c), old in zip(see(images, None, view, 0), moved.values, target.values, strict=True):
        places = image.nonzero()
        if c < 0:
            gone += 1
            assert len(places) == 0 or (places.max(0).values - places.min(0).values).min() < 2
            continue
        assert c == old[4]
        if len(places):
            low, high = places.min(0).values.flip(0), places.max(0).values.flip(0) + 1
            torch.testing.assert_close(torch.stack([x1, y1]), low.float(), atol=0.51, rtol=0)
            torch.testing.assert_close(torch.stack([x2, y2]), high.float(), atol=0.51, rtol=0)
    assert gone < 16


def test_a_view_without_a_size_is_refused():
    with pytest.raises(ValueError, match=r"set View\.picture"):
        Boxes()(labels(1), None, View.identity(1))


def test_each_treats_all_forms_of_predictions_alike():
    Two = namedtuple("Two", "a b")
    one, other = ({"x": Two(torch.zeros(2) + k, [torch.ones(1)]), "y": "word"} for k in (0, 1))
    found = each(lambda *parts: torch.cat(parts), one, other)
    assert isinstance(found["x"], Two) and found["x"].a.tolist() == [0, 0, 1, 1] and found["y"] == "word"
    assert found["x"].b[0].tolist() == [1, 1]


# --------------------------------------------------------------------------------------------------- network, data, run


def test_drawn_shapes_have_exact_boxes():
    image, maps, boxes = draw_shapes(32, 48, stream(0, "x"))
    assert image.shape == (32, 48, 48, 3) and maps.max() == 3
    assert (boxes[..., 4] >= 0).any(1).float().mean() < 1  # some are empty
    for own, of in zip(maps, boxes, strict=True):
        known = own == 0
        for x1, y1, x2, y2, c in of[of[:, 4] >= 0].int().tolist():
            inside = own[y1:y2, x1:x2] == c + 1
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            known[y1:y2, x1:x2] |= inside
        if (of[:, 4] >= 0).sum() == len(of):  # every shape has its box
            assert known.all()
    small, large = (Shapes(train_size=n, test_size=2, size=16).load()["train"] for n in (20, 40))
    assert torch.equal(small.column("image"), large.column("image")[:20])
    assert torch.equal(small.column("boxes").values, large.column("boxes")[:20].values)


def test_retinas_anchors_and_outputs_stand_at_the_same_place():
    """A head that looks at one place only sees exactly this place's anchors change."""
    net = Retina(
        3, {"image": (3, 40, 48)}, name="shufflenet_v2_x0_5", width=4, levels=[2, 3, 4, 5, 6, 7], head_layers=0
    )
    assert net.sizes == [(10, 12), (5, 6), (3, 3), (2, 2), (1, 1), (1, 1)]
    heads = net.decoder(Detection("boxes", C))
    features = torch.zeros(1, 4, sum(h * w for h, w in net.sizes))
    place = 12 * 3 + 5  # row 3, column 5 of level 2
    features[:, :, place] = 1
    centre = (heads.anchors[9 * place : 9 * place + 9, :2] + heads.anchors[9 * place : 9 * place + 9, 2:]) / 2
    assert torch.equal(centre, torch.tensor([[22.0, 14.0]]).expand(9, 2))
    for tower in (heads.classes, heads.offsets):  # the middle of each kernel only
        tower[-1].weight.data *= torch.tensor([0, 1, 0])[:, None] * torch.tensor([0, 1, 0])
    found, empty = heads(features), heads(features * 0)
    assert found.classes.shape == (1, len(heads.anchors), C)
    changed = (found.classes != empty.classes).any(2) & (found.offsets != empty.offsets).any(2)
    assert changed.nonzero()[:, 1].tolist() == list(range(9 * place, 9 * place + 9))
    sides = (16.0, 16 * 2 ** (1 / 3), 16 * 2 ** (2 / 3))
    corners = AnchorGenerator().generate_anchors(sides, (0.5, 1.0, 2.0))  # rounded to whole pixels there
    torch.testing.assert_close(heads.anchors[:9] - heads.anchors[:9].view(9, 2, 2).mean(1).repeat(1, 2), corners,
                               atol=0.51, rtol=0)  # fmt: skip


def test_the_size_in_the_config_file():
    node = yaml.safe_load((shipped.ROOT / "conf/arch/retina.yaml").read_text())
    with torch.device("meta"):
        built = schema.build(node, "arch", in_channels=3, in_shapes={"image": (3, 64, 64)})
        model = HardSharing(built, Shapes().tasks)
        macs = count_macs(model, {"image": torch.zeros(1, 3, 64, 64)})
    first = (shipped.ROOT / "conf/arch/retina.yaml").read_text().partition("\n")[0]
    assert first.endswith(f"{count_parameters(model) / 1e6:.3g} M parameters, {macs / 1e6:.3g} MMAC at 64x64"), first


TINY = ("data=boxes", "data.train_size=16", "data.test_size=8", "data.batch_size=8", "data.size=32", "arch=retina",
        "arch.name=shufflenet_v2_x0_5", "arch.width=4", "arch.levels=[2,3]", "arch.head_layers=0", "optimizer=adam",
        "trainer.device=cpu", "logger=none")  # fmt: skip


@pytest.mark.parametrize("more", [
    ("loss=pcgrad", "data.label_fraction={boxes: 0.5}", "microscope.every=1"), ("loss=mgda", "step.gradients=features"),
    ("loss=modo",),
    ("loss=amtl", "loss.potentials={boxes: 50, segmentation: 50}", "data.val_fraction=0.25"),
])  # fmt: skip
def test_a_run_with_boxes(cli, more):
    """Some images without a label, gradients of the features, batches of two parts, a method that reads the score."""
    run = cli(*TINY, *more, "trainer.epochs=1")
    assert run.code == 0, run.err
    assert ("labels    boxes 8 of 16 training images" in run.out) == ("data.label_fraction={boxes: 0.5}" in more)
    (file,) = Path().rglob("metrics.jsonl")
    (row,) = map(json.loads, file.read_text().splitlines())
    assert {"test/boxes_ap", "test/boxes_ap50", "train/boxes_loss"} <= row.keys() and "train/boxes_ap" not in row


def test_boxes_maps_and_depth_of_two_data_sets_in_one_network(cli):
    parts = [f"data.parts.{key}=32" for key in ("boxes.size", "rooms.height", "rooms.width")]
    sizes = [f"data.parts.{name}.{key}=8" for name in ("boxes", "rooms") for key in ("train_size", "test_size")]
    run = cli("data=union", "data.parts=[boxes,rooms]", "data.separate=true", *parts, *sizes, *TINY[5:],
              "data.batch_size=8", "trainer.epochs=1", "loss=pcgrad")  # fmt: skip
    assert run.code == 0, run.err
    (file,) = Path().rglob("metrics.jsonl")
    assert {"test/boxes_boxes_ap", "test/rooms_depth_abs_err", "test/boxes_segmentation_miou"} <= json.loads(
        file.read_text()
    ).keys()


@pytest.mark.parametrize(("words", "message"), [
    (("loss=amtl", "loss.potentials={boxes: 50, segmentation: 50}"),
     "loss: AMTL reads boxes_ap, which is measured on validation data only, and there is none; set data.val_fraction"),
    (("schedule=plateau", "schedule.metric=boxes_ap50"), "schedule: Plateau reads boxes_ap50, which is measured on"),
])  # fmt: skip
def test_what_does_not_fit_is_said(cli, words, message):
    run = cli(*TINY, *words)
    assert run.code == 2 and message in run.err, run.err


@pytest.mark.parametrize(("levels", "message"), [
    ([3, 5], r"levels: \[3, 5\]; whole numbers one after another are needed"), ([], r"levels: \[\]; whole numbers"),
    ([1, 2], "levels: shufflenet_v2_x0_5 has no map of level 1, only 2"),
    ([7, 8], r"levels: \[7, 8\]; shufflenet_v2_x0_5 has maps of the levels 2, 3, 4, 5"),
])  # fmt: skip
def test_levels_that_a_network_lacks_are_said(levels, message):
    with pytest.raises(ValueError, match=message):
        Retina(3, {"image": (3, 32, 32)}, "shufflenet_v2_x0_5", levels=levels)


def test_a_network_without_anchors_is_refused(cli):
    run = cli(*TINY[:5], "arch=fcn", "logger=none")
    assert run.code == 1 and "data: task 'boxes': boxes needs" in run.err and "such as arch=retina" in run.err


def test_predict_and_pictures_of_boxes(cli, tmp_path):
    run = cli(*TINY, "trainer.epochs=1", "trainer.pictures=2")
    assert run.code == 0, run.err
    (folder,) = (file.parent for file in Path().rglob("metrics.jsonl"))
    loaded = load(folder)
    answers = loaded.predict(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))["boxes"]
    assert answers["box"].shape[::2] == (3, 4)
    write(tmp_path / "a.npz", list("abc"), _flat(loaded.tasks, {"boxes": answers, "segmentation": {}}))
    assert np.load(tmp_path / "a.npz")["boxes_box"].shape == tuple(answers["box"].shape)
    assert list((folder / "pictures").glob("*.png"))


# ------------------------------------------------------------------------------------------------------------ real data


def picture(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(array).save(file)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of 40 x 80 pixels, and a map with a box of ones at rows 10 to 30, columns 20 to 60."""
    shown = np.zeros((40, 80), np.uint8)
    shown[10:30, 20:60] = 1
    return np.stack([shown * 200 + seed] * 3, -1), shown


@pytest.fixture
def coco(tmp_path) -> Path:
    """Six training images: three with boxes, two without any object, one not labelled; three with a map."""
    root = tmp_path / "coco128"
    for split in ("train2017", "val2017"):
        for i in range(6):
            image, shown = scene(i)
            picture(root / "images" / split / f"{i:03d}.jpg", image)
            if i < 3:
                picture(root / "semantic" / split / f"{i:03d}.png", shown * 200)
            if i < 5:
                (root / "boxes" / split).mkdir(parents=True, exist_ok=True)
                text = "79 0.5 0.5 0.5 0.5\n" if i < 3 else ""
                (root / "boxes" / split / f"{i:03d}.txt").write_text(text)
    panoptic = [{"id": i + 1} for i in range(132)] + [{"id": 200}]
    (root / "classes.json").write_text(json.dumps({"panoptic": panoptic}))
    return tmp_path


def test_coco_is_read_and_resized_with_its_boxes_and_maps(coco):
    data = COCO(root=str(coco), height=40, width=32)
    train = data.splits()["train"]
    boxes, maps = train.column("boxes"), train.column("segmentation")
    assert boxes.lengths.tolist() == [1, 1, 1, 0, 0, -1]
    assert boxes.values.tolist() == [[8, 10, 24, 30, 79]] * 3
    shown = (train.column("image")[:3, ..., 0] > 100).nonzero()
    assert shown.amin(0)[1:].tolist() == [10, 8] and shown.amax(0)[1:].tolist() == [29, 23]
    assert (maps[:3] == 132).nonzero().amin(0)[1:].tolist() == [10, 8]
    assert ((maps == 132).sum() + (maps == -100).sum()) == maps.numel() and (maps[3:] == -100).all()
    assert [task.units(train.column(task.column)).gt(0).sum().item() for task in data.tasks] == [5, 3]


@pytest.mark.parametrize(("file", "content", "message"), [
    ("boxes/train2017/001.txt", "3 0.5 0.5 0.5\n", '001.txt, line 1: "class x y width height" is needed'),
    ("boxes/train2017/001.txt", "3 0.5 0.5 0.5 0\n", "001.txt, line 1: the box has no area in the image"),
    ("boxes/train2017/001.txt", "80 0.5 0.5 0.5 0.5\n", "sample 1 has the label 80.0; a ragged column with rows"),
    ("semantic/train2017/001.png", "no picture", "001.png: is damaged, or no image"),
    ("classes.json", "{}", 'classes.json: a list of categories under the key "panoptic" is needed'),
])  # fmt: skip
def test_damaged_files_of_coco_are_named(coco, file, content, message):
    (coco / "coco128" / file).write_text(content)
    with pytest.raises(SetupError, match=re.escape(message)):
        COCO(root=str(coco), height=40, width=32).splits()


@pytest.fixture
def pets(tmp_path) -> Path:
    """Eight training images, two without a head, one of these without a trimap; four test images without heads."""
    notes = tmp_path / "oxford-iiit-pet" / "annotations"
    for split, size in (("trainval", 8), ("test", 4)):
        names = [f"{split}_{i}" for i in range(size)]
        for i, name in enumerate(names):
            image, shown = scene(i)
            picture(notes.parent / "images" / f"{name}.jpg", image)
            if i != 7:
                picture(notes / "trimaps" / f"{name}.png", 2 - shown)
            if split == "trainval" and i < 6:
                (notes / "xmls").mkdir(exist_ok=True)
                box = "<xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>30</ymax>"
                (notes / "xmls" / f"{name}.xml").write_text(
                    f"<annotation><object><name>dog</name><bndbox>{box}</bndbox></object></annotation>"
                )
        (notes / f"{split}.txt").write_text("".join(f"{name} {i + 1} 1 1\n" for i, name in enumerate(names)))
    return tmp_path


def test_pets_have_heads_in_training_only(pets):
    data = Pets(root=str(pets), height=40, width=32, val_fraction=0.25)
    splits = data.splits()
    lengths = torch.cat([splits[name].column("head").lengths for name in ("train", "val")])
    assert lengths.sort().values.tolist() == [-1] * 2 + [1] * 6
    assert splits["train"].column("head").values.tolist() == [[8, 10, 24, 30, 1]] * len(
        splits["train"].column("head").values
    )
    assert splits["test"].column("head").lengths.tolist() == [-1] * 4
    maps = torch.cat([splits[name].column("trimap") for name in ("train", "val")])
    assert (maps.flatten(1) == -100).all(1).sum() == 1
    assert (maps == 0).sum() == 7 * 20 * 16 and set(maps.unique().tolist()) == {-100, 0, 1}


def test_a_run_on_pets(cli, pets):
    """No test image has a head: its score is missing there, and this is no divergence."""
    run = cli("data=pets", f"data.root={pets}", "data.height=32", "data.width=32", "data.batch_size=4",
              "data.val_fraction=0.25", *TINY[5:], "trainer.epochs=1", "loss=pcgrad")  # fmt: skip
    assert run.code == 0, run.err
    (file,) = Path().rglob("metrics.jsonl")
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["test/head_ap"] is None and row["val/head_ap"] >= 0


@pytest.mark.parametrize("kind", [COCO, Pets])
def test_missing_data_is_said(kind, tmp_path):
    with pytest.raises(SetupError, match=r"is not in data\.root=.*MTL_DATA"):
        kind(root=str(tmp_path)).splits()
