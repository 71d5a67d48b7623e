"""CelebA: the files, the official partition, forty questions, the network, and what chooses the best epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from mtl.archs.celeba_cnn import CelebACNN
from mtl.archs.model import HardSharing, count_parameters
from mtl.data.celeba import ATTRIBUTES, FOLDER, LABELS, PARTITION, CelebA
from mtl.engine.summary import best, selection
from mtl.errors import SetupError
from mtl.metrics.binary import YesOrNo
from mtl.report.overall import kinds
from mtl.report.protocols import benchmarks
from mtl.report.runs import load
from mtl.tasks import Classification
from mtl.tasks.binary import Binary

REAL = ROOT.parent / "shared" / "data" / "celeba"
PARTS = [0] * 8 + [1] * 4 + [2] * 4


@pytest.fixture
def root(tmp_path) -> Path:
    """Sixteen images of 20 in the tables, one colour each. Nobody in test is bald, and nobody else is not."""
    folder, draws = tmp_path / "celeba", np.random.default_rng(0)
    (folder / FOLDER).mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(20)]
    values = draws.choice([-1, 1], (20, 40))
    values[:, ATTRIBUTES.index("Bald")] = [1] * 12 + [-1] * 8
    for i, name in enumerate(names[:16]):
        Image.new("RGB", (178, 218), (10 * i, 100, 200)).save(folder / FOLDER / name, quality=95)
    rows = [f"{name} {'  '.join(map(str, row))}" for name, row in zip(names, values, strict=True)]
    (folder / LABELS).write_text("\n".join(["20", " ".join(ATTRIBUTES), *rows, ""]))
    parts = [f"{name} {part}" for name, part in zip(names, [*PARTS, 2, 2, 2, 2], strict=True)]
    (folder / PARTITION).write_text("\n".join([*parts, ""]))
    np.save(tmp_path / "values.npy", values[:16])
    return tmp_path


def test_the_official_parts_are_read_and_images_are_decoded_once(root, capsys):
    values, (folder,) = np.load(root / "values.npy"), [root / "celeba"]
    splits = CelebA(root=str(root), size=16).splits()
    assert "CelebA: 16 of the 202,599 images are in" in capsys.readouterr().out
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "val": 4, "test": 4}
    for i, split in enumerate(splits.values()):
        here = [k for k, part in enumerate(PARTS) if part == i]
        assert torch.equal(split.column("attributes"), torch.from_numpy(values[here] > 0).to(torch.int8))
        image = split.column("image")
        assert image.shape == (len(here), 16, 16, 3) and image.dtype == torch.uint8
        assert (image.float().mean((1, 2)) - torch.tensor([[10 * k, 100, 200] for k in here])).abs().max() < 3
    for file in (folder / FOLDER).iterdir():  # the array is there: nothing is decoded again
        stat = file.stat()
        file.write_bytes(b"x" * stat.st_size)
        import os

        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = CelebA(root=str(folder), size=16).splits()
    assert torch.equal(again["test"].column("image"), splits["test"].column("image"))


def spoil(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(("fault", "message"), [
    (lambda f: (f / FOLDER).rename(f / "img"), r"CelebA is not in data\.root=\S+: looked for \S+ and \S+\. Fetch"),
    (lambda f: empty(f / FOLDER), r"img_align_celeba: there is no \.jpg in it"),
    (lambda f: (f / PARTITION).unlink(), r"list_eval_partition\.txt is missing; it is one of CelebA's official files"),
    (lambda f: (f / FOLDER / "000003.jpg").write_bytes(b"no"), r"000003\.jpg: is damaged, or no image; fetch it again"),
    (lambda f: spoil(f / LABELS, "000005.jpg", "x"), r"there is no line for the image 000005\.jpg"),
    (lambda f: spoil(f / PARTITION, "000005.jpg", "x"), r"partition\.txt: there is no line for the image 000005\.jpg"),
    (lambda f: spoil(f / LABELS, "Bald", "Bold"), r"line 2 must name the 40 attributes, .*; name 5 is 'Bold'"),
    (lambda f: spoil(f / LABELS, " Young\n", "\n"), r"line 2 must name the 40 attributes, .*; 39 names"),
    (lambda f: spoil(f / LABELS, "000002.jpg ", "000002.jpg 1 "), r"'000002.jpg .*; a name and 40 whole numbers"),
    (lambda f: spoil(f / PARTITION, "000002.jpg 0", "000002.jpg 3"), r"000002\.jpg has the part 3; 0, 1 or 2"),
    (lambda f: spoil(f / PARTITION, ".jpg 1", ".jpg 0"), r"gives 12 train, 0 val, 4 test images; there is no val"),
    (lambda f: (f / LABELS).write_bytes(b"20\n\xff\xfe\n"), r"list_attr_celeba\.txt is damaged or unreadable"),
])  # fmt: skip
def test_a_fault_in_the_files_is_one_line(root, fault, message):
    fault(root / "celeba")
    with pytest.raises(SetupError, match=message) as error:
        CelebA(root=str(root), size=16).splits()
    assert "\n" not in str(error.value)


def test_f1_and_accuracy_equal_scikit_learn():
    draws = torch.Generator().manual_seed(0)
    logits, target = torch.randn(60, 1, generator=draws), torch.randint(2, (60,), generator=draws)
    target[::7] = -100
    known, metric = target != -100, YesOrNo()
    state = metric.zero()
    for part in (slice(0, 25), slice(25, 60)):
        metric.update(state, logits[part], target[part])
    truth, answer = target[known], (logits[known, 0] > 0).long()
    expected = {"f1": 100 * f1_score(truth, answer), "accuracy": 100 * accuracy_score(truth, answer)}
    assert metric.compute(state.double()) == pytest.approx(expected)


@pytest.mark.parametrize(("target", "f1", "accuracy"), [([0, 0], math.nan, 50.0), ([1, -100], 100.0, 100.0),
                                                        ([-100, -100], math.nan, math.nan)])  # fmt: skip
def test_f1_without_a_positive_label_is_undefined(target, f1, accuracy):
    metric = YesOrNo()
    state = metric.zero()
    metric.update(state, torch.tensor([[2.0], [-1.0]]), torch.tensor(target))
    assert metric.compute(state.double()) == pytest.approx({"f1": f1, "accuracy": accuracy}, nan_ok=True)


def test_the_loss_is_torchs_and_missing_labels_add_nothing():
    logits = torch.tensor([[0.3], [-2.0], [math.nan]], requires_grad=True)
    loss = Binary("a").loss(logits, torch.tensor([1, 0, -100], dtype=torch.int8))
    expected = nn.BCEWithLogitsLoss()(logits[:2, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and gradient[2] == 0


def test_the_network_has_the_papers_size():
    model = HardSharing(CelebACNN(3), CelebA().tasks)
    assert count_parameters(model) == 5_197_160
    assert sum(p.numel() for p in model.shared_parameters()) == 5_176_640


def test_the_best_epoch_is_the_one_with_the_best_mean():
    """An undefined value has no part in the mean; "first" is the rule of every other data set."""
    tasks = (Binary("a"), Binary("b"), Binary("c"))
    rows = [
        {"epoch": i, "val/a_f1": a, "val/b_f1": b, "val/c_f1": math.nan}
        for i, (a, b) in enumerate([(9, 1), (7, 8), (8, 2)])
    ]
    mean, first = (selection(tasks, True, select) for select in ("mean", "first"))
    assert best(rows, mean) is rows[1] and mean.value(rows[1]) == 7.5 and mean.by == "val/mean"
    assert best(rows, first) is rows[0] and first.by == "val/a_f1"


def test_a_mean_of_different_metrics_is_refused():
    class Mixed(CelebA):
        tasks = (Binary("a"), Classification("b", 2))

    from mtl.data.check import check_declared

    with pytest.raises(ValueError, match="select: 'mean' needs one kind of main metric, not accuracy, f1"):
        check_declared(Mixed())


class Tiny(nn.Module):
    out_features = 6

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_channels, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mean((2, 3)))


def test_a_run_selects_by_the_mean_says_undefined_and_can_be_repeated(root, cli):
    words = ("experiment=celeba", f"data.root={root}", "data.size=16", f"arch._target_={__name__}.Tiny", "logger=none",
             "trainer.epochs=2", "data.batch_size=4", "trainer.device=cpu", "loss=pcgrad")  # fmt: skip
    first = cli(*words)
    assert first.code == 0, first.err
    (file,) = Path("outputs").rglob("summary.json")
    text = file.read_text()
    summary, rows = (
        json.loads(text),
        [json.loads(line) for line in file.with_name("metrics.jsonl").read_text().splitlines()],
    )
    assert "NaN" not in text and [row["test/Bald_f1"] for row in rows] == [None, None]
    means = [np.mean([row[f"val/{a}_f1"] for a in ATTRIBUTES if row[f"val/{a}_f1"] is not None]) for row in rows]
    assert (
        summary["selected"]["by"] == "val/mean" and summary["selected"]["epoch"] == rows[int(np.argmax(means))]["epoch"]
    )
    file.unlink()  # written anew from the rows
    assert cli(*words).code == 0
    anew = json.loads(file.read_text())
    assert all(anew[key] == summary[key] for key in ("selected", "best", "last", "select", "tasks"))
    said = first.out + first.err
    assert len(max(said.splitlines(), key=len)) < 400 and "40 f1" in said
    assert "mean f1 of 40 tasks" in said and "(of 39)" in said and "Young_f1" not in said
    (run,) = load(["outputs"]).runs
    (benchmark,) = benchmarks([run])
    assert "mean f1 of 39 tasks" in kinds(benchmark)  # Bald has no value in any run


@pytest.mark.skipif(not (REAL / FOLDER).is_dir(), reason="the real CelebA images are not at hand")
def test_the_real_tables_are_read(tmp_path):
    """The official tables, for the images at hand."""
    from mtl.data.celeba import _attributes

    names = sorted(file.name for file in (REAL / FOLDER).iterdir())
    values = _attributes(REAL / LABELS, names)
    assert values.shape == (6000, 40) and values.dtype == torch.int8
