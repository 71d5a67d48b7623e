"""Pictures of test samples: their colours, the files of a run, what trackers and the report page make of them."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_dense import SMALL, left
from tree import write_run

from mtl.data.inputs import Image as ImageInput
from mtl.data.inputs import Numbers
from mtl.engine.pictures import _checked
from mtl.report.__main__ import main
from mtl.report.figures import pictures as page_pictures
from mtl.tasks import Classification, Depth, Normals, Segmentation
from mtl.tracking.pictures import GAP, PictureGrid, encode, path_of, read
from mtl.tracking.wandb import WandbTracker

# ----------------------------------------------------------------------------------------------------------- colours


def test_a_class_has_one_colour_and_black_is_no_label():
    task = Segmentation("s", 40)
    target = torch.arange(40, dtype=torch.int8).view(1, 5, 8)
    scores = torch.nn.functional.one_hot(target.long(), 40).movedim(-1, 1).float()
    truth, prediction = task.draw(None, scores, target)
    assert truth.dtype == torch.uint8 and truth.shape == (1, 5, 8, 3) and torch.equal(truth, prediction)
    assert len({tuple(c) for c in truth.view(-1, 3).tolist()} - {(0, 0, 0)}) == 40
    target[0, 0, 0], scores[0, 3, 0, 1] = -100, torch.nan
    unlabelled, wrong = task.draw(None, scores, target)
    assert unlabelled[0, 0, 0].sum() == 0 and torch.equal(unlabelled[0, 1:], truth[0, 1:])
    assert wrong[0, 0, 1].sum() == 0 and torch.equal(wrong[0, 1:], truth[0, 1:])


def test_truth_and_prediction_share_the_range_of_the_true_depth():
    task, target = Depth("d"), torch.tensor([[[1.0, 2.0], [5.0, 0.0]], [[torch.nan, 3.0], [3.0, 3.0]]])
    truth, same = task.draw(None, target.nan_to_num()[:, None], target)
    known = target > 0
    assert torch.equal(truth[known], same[known]) and truth[~known].sum() == 0
    assert truth[0, 0, 0].tolist() == [68, 1, 84] and truth[0, 1, 0].tolist() == [253, 231, 37]  # viridis's ends
    assert truth[1, 0, 1].tolist() == [33, 144, 141]  # 3 m is its middle
    # Beyond the range: the colours of its ends. No number: black.
    prediction = torch.tensor([[[9.0, -1.0], [torch.inf, torch.nan]]]).expand(2, -1, -1)[:, None]
    _, drawn = task.draw(None, prediction, target)
    assert drawn[0].view(4, 3).tolist() == [[253, 231, 37], [68, 1, 84], [253, 231, 37], [0, 0, 0]]
    # Without any label there is still a picture of the prediction.
    none, alone = task.draw(None, torch.tensor([[[[1.0, 2.0]]]]), torch.zeros(1, 1, 2))
    assert none.sum() == 0 and alone.view(2, 3).tolist() == [[68, 1, 84], [253, 231, 37]]
    assert all(x.sum() == 0 for x in task.draw(None, torch.full((1, 1, 1, 2), torch.nan), torch.zeros(1, 1, 2)))


def test_normals_have_the_usual_colours():
    target = torch.tensor([[[[0.0, 0, 1], [-1, 0, 0], [0, 0, 0], [torch.nan] * 3]]])
    truth, prediction = Normals("n").draw(None, 7 * target.movedim(-1, 1), target)  # of any length
    assert truth.tolist() == prediction.tolist() == [[[[128, 128, 255], [0, 128, 128], [0, 0, 0], [0, 0, 0]]]]


def test_inputs_and_tasks_without_a_picture():
    rows = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    assert torch.equal(ImageInput((3, 3, 4)).draw(rows[..., :3]), rows[..., :3])
    assert torch.equal(ImageInput((4, 3, 4)).draw(rows[..., :4]), rows[..., :3])
    assert torch.equal(ImageInput((5, 3, 4)).draw(rows), rows[..., :1].expand(2, 3, 4, 3))
    assert Numbers((7,)).draw(torch.zeros(2, 7)) is None
    assert Classification("c", 3).draw(rows, torch.zeros(2, 3), torch.zeros(2)) is None


# ------------------------------------------------------------------------------------------------------------- files


def sheet(seed: int = 0, samples: int = 2, tasks=("a", "b"), truth: int = 0) -> PictureGrid:
    """Random tiles of 6x8. Image and truth depend on `truth` only."""
    columns = (("", "image"), *((task, kind) for task in tasks for kind in ("truth", "prediction")))
    seeds = [1000 + 100 * i + seed if kind == "prediction" else 100 * i + truth for i, (_, kind) in enumerate(columns)]
    draws = map(np.random.default_rng, seeds)
    return PictureGrid(columns, np.stack([d.integers(0, 256, (samples, 6, 8, 3)).astype(np.uint8) for d in draws]))


def test_a_sheet_comes_back_from_its_file(tmp_path):
    one, file = sheet(), tmp_path / "x.png"
    file.write_bytes(encode(one))
    again = read(file)
    assert again.columns == one.columns and np.array_equal(again.tiles, one.tiles)
    assert Image.open(file).size == (5 * (8 + GAP) - GAP, 2 * (6 + GAP) - GAP)
    assert one.caption.endswith("Columns: image, a truth, a prediction, b truth, b prediction.")


def break_file(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif how == "foreign":
        Image.new("RGB", (48, 14)).save(file)
    elif how == "resized":
        text = Image.open(file).info["mtl"]
        file.write_bytes(data.replace(text.encode(), text.replace('"samples": 2', '"samples": 9').encode()))
    else:
        changed = {
            "empty": b"",
            "half": data[: len(data) // 2],
            "text": b"not a picture, but long enough for one",
            "huge": data[:16] + b"\x7f\xff\xff\xff" * 2 + data[24:],
            "flipped": data[:200] + b"???" + data[203:],
        }
        file.write_bytes(changed[how])  # fmt: skip


BROKEN = ("empty", "half", "text", "huge", "flipped", "foreign", "resized", "pipe")


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_no_sheet(tmp_path, how):
    file = tmp_path / "x.png"
    file.write_bytes(encode(sheet()))
    break_file(file, how)
    with pytest.raises(ValueError):
        read(file)


# -------------------------------------------------------------------------------------------------------------- runs


def files(root: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(Path(root).rglob("pictures/*"))}


def test_pictures_of_a_run(cli, monkeypatch):
    """They change nothing else. An interrupted run has the same ones in the end. W&B and TensorBoard show them."""
    from mtl.engine.run import Job

    small = (*SMALL, "trainer.pictures=3")
    assert cli(*small, "output_root=with", "logger=tensorboard").code == 0
    assert list(files("with")) == ["epoch_0001.png", "epoch_0002.png", "epoch_0003.png"]
    sheets = [read(f) for f in sorted(Path("with").rglob("pictures/*"))]
    assert sheets[0].tiles.shape == (7, 3, 16, 24, 3)
    for task in ("segmentation", "depth", "normals"):
        assert np.array_equal(*(s.column(task, "truth") for s in (sheets[0], sheets[2])))
    assert not np.array_equal(*(s.column("normals", "prediction") for s in (sheets[0], sheets[2])))
    _check_trackers(sheets)

    # A kill between the checkpoint and the second picture; a later picture is of an attempt that was given up.
    with monkeypatch.context() as patch:
        save = Job._save
        patch.setattr(Job, "_save", lambda self, row: (save(self, row), 1 / (2 - row["epoch"])))
        assert cli(*small, "output_root=parts").code == 1
    (folder,) = Path("parts").rglob("pictures")
    assert os.listdir(folder) == ["epoch_0001.png"]
    (folder / "epoch_0016.png").write_bytes(b"")
    assert cli(*small, "output_root=parts").code == 0
    assert files("parts") == files("with")

    assert cli(*SMALL, "output_root=without", "trainer.pictures=0").code == 0
    torch.testing.assert_close(left("with"), left("without"), rtol=0, atol=0)
    paths = [next(Path(root).rglob("run.json")).relative_to(root) for root in ("with", "without")]
    assert paths[0] == paths[1] and not files("without")


def _check_trackers(sheets: list[PictureGrid]) -> None:
    (folder,) = (file.parent for file in Path("with").rglob("run.json"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Images("pictures")] == [1, 2, 3]
    assert (events.Images("pictures")[0].height, events.Images("pictures")[0].width) == sheets[0].page.shape[:2]
    tracker = WandbTracker()
    tracker.info, tracker.run = SimpleNamespace(directory=folder), mock.Mock()
    for epoch in (3, 4):
        tracker.log({"epoch": epoch, "test/loss": float("nan")})
    (third,), (fourth,) = (call.args for call in tracker.run.log.call_args_list)
    assert np.array_equal(np.array(third["pictures"].image), sheets[2].page) and fourth == {"epoch": 4}


OWN = """
from mtl.data.rooms import Rooms
from mtl.tasks import Depth, Segmentation

class Wrong(Depth):
    def draw(self, images, prediction, target):
        return None.wrong

class Mine(Rooms):
    tasks = (Segmentation("segmentation", 6), Wrong("depth"))
"""


def test_a_mistake_in_an_own_draw_costs_the_pictures_only(cli, monkeypatch, tmp_path):
    (tmp_path / "own_rooms.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = cli(*SMALL, "data._target_=own_rooms.Mine")
    message = (
        "WARNING   no pictures: AttributeError: 'NoneType' object has no attribute 'wrong' (own_rooms.py:7 in draw)"
    )
    assert result.code == 0 and result.out.count("no pictures: ") == 1 and message in result.out
    assert not files("outputs")
    assert "Traceback" in next(Path("outputs").rglob("train.log")).read_text()


@pytest.mark.parametrize("colours, shown", [
    (torch.zeros(2, 4, 5, 3), r"\(2, 4, 5, 3\) torch.float32"),
    (torch.zeros(2, 4, 5, dtype=torch.uint8), r"\(2, 4, 5\)"),
    (None, "NoneType"),
])  # fmt: skip
def test_what_is_no_picture_is_named(colours, shown):
    with pytest.raises(TypeError, match=f"Depth.draw gives {shown}.*uint8 are needed"):
        _checked(Depth("d"), colours)


# ------------------------------------------------------------------------------------------------------------ report


def put(run: Path, number: int = 0, shown=(1, 2), **options) -> Path:
    (run / "pictures").mkdir()
    for epoch in shown:
        path_of(run, epoch).write_bytes(encode(sheet(10 * number + epoch, **options)))
    return run


def page(root: Path) -> str:
    assert main([str(root / "runs"), "--out", str(root), "--format", "html,csv"]) == 0
    return (root / "report.html").read_text()


def columns(html: str) -> list[list[str]]:
    tables = re.findall(r'<table class="pictures".*?<thead>(.*?)</thead>', html)
    return [re.findall(r'<th scope="col">(.*?)</th>', head) for head in tables]


def test_the_page_shows_strategies_side_by_side_and_one_sample_over_the_epochs(tmp_path):
    for i, (loss, digest) in enumerate([("equal", "0" * 8), ("dwa", "1" * 8)]):
        put(write_run(tmp_path / "runs", loss, digest=digest), i)
    html = page(tmp_path)
    side = ["image", "truth", "dwa<small>seed 0, epoch 2</small>", "equal<small>seed 0, epoch 2</small>"]
    strip = ["truth", "epoch 1", "epoch 2"]
    assert [sorted(c) for c in columns(html)] == [sorted(c) for c in [side, side, strip, strip]]
    # Image, truths and predictions of two tasks, and four strips. The image stands in the page once.
    styles = re.findall(r"\.s\d+\{.*?base64,(.*?)\)\}", html)
    assert len(styles) == len(set(styles)) == 1 + 2 + 4 + 4
    assert html.count('role="img" aria-label="a, dwa, sample 2"') == 1
    used = set(re.findall(r'<div class="(s\d+)" role="img"', html))
    assert len(used) == len(styles)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_picture_costs_itself_only(tmp_path, how):
    """The one before it is shown, and a line names the file."""
    run = put(write_run(tmp_path / "runs"))
    break_file(path_of(run, 2), how)
    html = page(tmp_path)
    assert ["image", "truth", "equal<small>seed 0, epoch 1</small>"] in columns(html)
    assert re.search(r"Pictures left out: [^<]*epoch_0002\.png: ", html)


def test_pictures_that_are_gone_or_of_other_samples(tmp_path):
    put(write_run(tmp_path / "runs", "equal"))
    put(write_run(tmp_path / "runs", "dwa", digest="1" * 8), truth=7)
    put(write_run(tmp_path / "runs", "mgda", digest="2" * 8), samples=3)
    write_run(tmp_path / "runs", "uncertainty", digest="3" * 8)
    (write_run(tmp_path / "runs", "cagrad", digest="4" * 8) / "pictures").write_text("a file")
    html = page(tmp_path)
    assert all(len(c) == 3 for c in columns(html)[:2]) and html.count("other samples than") == 2
    shutil.rmtree(tmp_path / "runs")
    write_run(tmp_path / "runs")
    assert "<h3>Pictures" not in page(tmp_path) and "Pictures left out" not in page(tmp_path)


def test_the_page_has_room_for_so_many_pictures(tmp_path, monkeypatch):
    for i, loss in enumerate(["equal", "dwa", "mgda"]):
        put(write_run(tmp_path / "runs", loss, digest=str(i) * 8), i, tasks=("a",))
    monkeypatch.setattr(page_pictures.Sprites, "__init__", lambda self: self.__dict__.update(left=1900, styles={}))
    html = page(tmp_path)
    assert len(columns(html)[0]) == 3 and "as pictures would make this page too large: " in html
    assert 0 < sum(map(len, re.findall(r"\.s\d+\{.*?base64,(.*?)\)\}", html))) <= 1900


# -------------------------------------------------------------------------------------------------------------- cost


def test_the_table_of_cost_tells_a_gpus_memory_from_a_processs(tmp_path):
    for i, (loss, gpu) in enumerate([("equal", None), ("dwa", "H100"), ("mgda", "H100")]):
        for seed in (0, 1):
            hardware = {"gpu": gpu, "cpu": "Z80", "threads": 1}
            run = write_run(
                tmp_path / "runs", loss, seed, digest=str(i) * 8, rate=100.0 + 100 * seed, hardware=hardware
            )
            file = run / "summary.json"
            memory = {"peak_memory_gib": 2.0 + seed} if loss != "mgda" else {}
            file.write_text(json.dumps(json.loads(file.read_text()) | memory))
    html = page(tmp_path)
    header, *rows = (line.split(",") for line in (tmp_path / "synthetic-resnet20-cost.csv").read_text().splitlines())
    text = ",".join(header)
    assert "images/s" in text and '"peak GiB, GPU"' in text and '"peak GiB, process"' in text
    values = {row[0]: row[1:] for row in rows}
    assert values["equal"][1] == "150.0" and "2.5" in values["equal"] and "2.5" in values["dwa"]
    assert values["mgda"].count("") > values["dwa"].count("")
    assert "speed and memory" in html


def test_peak_memory_of_a_cpu_run_forgets_an_earlier_run():
    from mtl.engine.summary import forget_peak_memory, peak_memory

    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    cpu = torch.device("cpu")
    forget_peak_memory(cpu)
    before = peak_memory(cpu)
    torch.ones(2**26)  # 256 MiB
    during = peak_memory(cpu)
    forget_peak_memory(cpu)
    assert during - before > 0.2 and during - peak_memory(cpu) > 0.2
