"""Several data sets as one: joined columns, missing labels, balanced batches; and a share of the labels."""

import json
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_absent import METHODS, Net
from torch import nn

import mtl
from mtl.certify.problem import make
from mtl.config.identity import identify
from mtl.data import Benchmark, Image, Numbers, Ragged, Split
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.data.columns import Joined, join
from mtl.data.labels import keep_labels
from mtl.data.office import Office
from mtl.data.union import PART, Union
from mtl.engine.loaded import load
from mtl.errors import ConfigError, SetupError
from mtl.predict import main as predict
from mtl.tasks import Classification, Depth, Disparity, Normals, Regression, Segmentation, Task, alike
from mtl.views import Crop, Flip, ScaleCrop

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- joined columns


def test_rows_of_several_tensors_are_selected_as_from_their_concatenation():
    one, two = torch.arange(12, dtype=torch.uint8).view(6, 2), -torch.arange(8).view(4, 2)
    joined = join([(one, torch.tensor([5, 0])), (two, torch.arange(4)), (one, torch.tensor([3, 3]))])
    whole = torch.cat([one[[5, 0]].long(), two, one[[3, 3]].long()])
    assert (joined.shape, joined.dtype, len(joined), joined.element_size()) == (whole.shape, torch.int64, 8, 8)
    for index in (slice(None), slice(1, 6, 2), torch.tensor([7, 0, 2, 2]), torch.tensor([], dtype=torch.int64), 3):
        assert torch.equal(joined[index], whole[index])
    assert torch.equal(joined.pick(slice(2, 7))[1:3], whole[3:5])
    again = join([(joined, torch.tensor([6, 1])), (two, torch.tensor([2]))])  # joined columns join, and stay flat
    assert torch.equal(again[:], torch.stack([whole[6], whole[1], two[2]]))
    assert all(part.data_ptr() in (one.data_ptr(), two.data_ptr()) for part in again.parts)  # nothing was copied
    with pytest.raises(ValueError, match=r"rows of shape \(2,\) and rows of shape \(3,\)"):
        join([(one, torch.arange(1)), (torch.zeros(1, 3), torch.arange(1))])


def test_ragged_columns_are_joined_with_unlabelled_samples():
    boxes = Ragged.of([torch.ones(2, 4), None, torch.zeros(0, 4)])
    none = Ragged(boxes.values[:0], torch.tensor([-1]))
    found = join([(none, torch.zeros(2, dtype=torch.int64)), (boxes, torch.tensor([2, 0]))])
    assert found.lengths.tolist() == [-1, -1, 0, 2] and len(found.values) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float32])
@pytest.mark.parametrize("task", [Classification("a", 3), Regression("a"), Segmentation("a", 3), Depth("a"),
                                  Disparity("a"), Normals("a")])  # fmt: skip
def test_every_kind_of_task_has_a_value_for_no_label(task, dtype):
    if dtype.is_floating_point and isinstance(task, Classification | Segmentation):
        return  # classes are integers
    shape = {Segmentation: (2, 3), Depth: (2, 3), Disparity: (2, 3), Normals: (2, 3, 3)}.get(type(task), ())
    missing = task.missing(torch.Size(shape), dtype)[None]
    assert missing.shape == (1, *shape)
    assert not task.labelled(missing).any()
    joined = join([(torch.ones(2, *shape, dtype=dtype), torch.arange(2)), (missing, torch.zeros(1).long())])
    assert task.labelled(joined[:]).tolist() == [True, True, False]


# -------------------------------------------------------------------------------------------------- the share of labels


@dataclass
class Table(Benchmark):
    """Numbers with a class, a number and a map; every third sample has no number."""

    batch_size: int = 8
    size: int = 40
    first: int = 0

    tasks = (Classification("kind", 3), Regression("value"))
    inputs = {"x": Numbers((2,))}

    def load(self):
        def split(size, start):
            x = torch.arange(start, start + size, dtype=torch.float32)
            value = torch.where(x % 3 == 0, torch.nan, x)
            return Split({"x": torch.stack([x, -x], 1), "kind": (x % 3).to(torch.uint8), "value": value})

        return {"train": split(self.size, self.first), "test": split(6, 1000)}


def kept(fraction, name="value", **options):
    train = Table(label_fraction=fraction, **options).splits()["train"]
    task = next(t for t in Table.tasks if t.name == name)
    labels = train.column(name)
    labels = labels[:] if isinstance(labels, Joined) else labels
    x = train.column("x")[:, 0]
    have = task.labelled(labels)
    assert torch.equal(labels[have].float(), (x % 3 if name == "kind" else x)[have])  # who keeps one keeps their own
    return set(x[have].tolist())


@pytest.mark.parametrize("options", [{}, {"limit_train": 31}, {"val_fraction": 0.2}])
def test_smaller_shares_are_parts_of_larger_ones(options):
    shares = [0.01, 0.1, 0.2, 0.5, 1.0]
    found = [kept(share, **options) for share in shares]
    assert all(a <= b for a, b in pairwise(found))
    assert [len(one) for one in found] == [max(1, round(len(found[-1]) * share)) for share in shares]
    assert kept({"kind": 0.5}, **options) == found[-1]  # the other task keeps all
    assert len(kept(0.5, "kind", **options)) == round(len(kept(1.0, "kind", **options)) / 2)


def test_the_columns_of_the_data_set_stay_as_they_are():
    loaded = Table().load()["train"]
    before = {name: column.clone() for name, column in loaded.columns.items()}
    thin = keep_labels(loaded, 0.1, Table.tasks)
    assert thin.columns["x"] is loaded.columns["x"]
    assert thin.columns["value"].parts[0] is loaded.columns["value"]
    assert all(torch.equal(before[n].nan_to_num(), c.nan_to_num()) for n, c in loaded.columns.items())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int64, torch.float32])
def test_tasks_of_a_matrix_lose_labels_each_by_itself(kind):
    """In the matrix, which is read in another order of rows, only that task's column changes; and no row is copied."""
    tasks = alike(Regression, ["a", "b", "c"], target="y") if kind.is_floating_point else \
        alike(Classification, ["a", "b", "c"], outputs=50, target="y")  # fmt: skip
    y = torch.arange(36).view(12, 3).to(kind)
    before, rows = y.clone(), torch.tensor([11, 3, 5, 7, 9, 1, 0, 2])
    thin = keep_labels(Split({"y": y}, rows), {"a": 0.5, "b": 0.25}, tasks)
    found = thin.column("y")
    for task, count in zip(tasks, (4, 2, 8), strict=True):
        have = task.labelled(task.select(found))
        assert have.sum() == count and torch.equal(task.select(found)[have].to(kind), task.select(y[rows])[have])
    assert torch.equal(y, before) and thin.columns["y"].parts[0] is y
    others = torch.tensor([4, 6, 8, 10])
    assert torch.equal(thin.columns["y"][others].to(kind), y[others])
    same = keep_labels(Split({"y": y}, rows), 0.5, tasks).column("y")
    assert torch.equal(same[:, 0].nan_to_num(-1), found[:, 0].nan_to_num(-1))  # the same as for the task alone
    assert len({tuple(task.labelled(task.select(same)).tolist()) for task in tasks}) > 1
    # A column for each task gives the same samples.
    apart = [Classification(t.name, 50) if not kind.is_floating_point else Regression(t.name) for t in tasks]
    single = keep_labels(Split(dict(zip("abc", y.T, strict=True)), rows), 0.5, apart)
    for i, task in enumerate(apart):
        assert torch.equal(task.labelled(single.column(task.name)), tasks[i].labelled(same[:, i]))


def test_ragged_labels_are_taken_away():
    class Marks(Task):
        metrics = ()

        def units(self, target):
            return (target.lengths >= 0).long()

        def criterion(self, prediction, target):
            raise NotImplementedError

    column = Ragged.of([torch.full((i % 3,), float(i)) for i in range(20)])
    thin = keep_labels(Split({"marks": column}), 0.25, [Marks("marks")]).columns["marks"]
    assert int((thin.lengths >= 0).sum()) == 5 and len(thin) == 20
    for i in range(20):
        assert int(thin.lengths[i]) in (-1, i % 3) and thin[i].tolist() == [float(i)] * max(0, int(thin.lengths[i]))


@pytest.mark.parametrize(("fraction", "message"), [
    ({"knd": 0.1}, "there is no task 'knd', only kind, value; did you mean kind"),
    ({"a": 0.1, "b": 0.2}, "a and b share the column 'c'"),
    (0.5, "task 'all' cannot be without a label: All.units counts All.missing"),
])  # fmt: skip
def test_a_share_that_cannot_be_is_refused(fraction, message):
    class All(Regression):
        def units(self, target):
            return torch.ones_like(target, dtype=torch.int64)

    tasks = {"a": [Regression("a", target="c"), Regression("b", target="c")]}.get(next(iter(fraction), "")) \
        if isinstance(fraction, dict) else [All("all")]  # fmt: skip
    column = {"c": torch.zeros(4), "all": torch.zeros(4), "kind": torch.zeros(4).long(), "value": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        keep_labels(Split(column), fraction, tasks or Table.tasks)


# ------------------------------------------------------------------------------------------------------------ the union


@dataclass
class Pictures(Benchmark):
    """Images whose every pixel is the sample's number, with one class."""

    batch_size: int = 4
    size: int = 12
    first: int = 0
    name: str = "a"
    views: tuple = ()
    side: int = 6
    classes: int = 4

    @property
    def tasks(self):
        return (Classification(self.name, 4), Segmentation("map", self.classes))

    @property
    def inputs(self):
        return {"image": Image((1, self.side, self.side))}

    @property
    def augment(self):
        return self.views

    def load(self):
        def split(size, first):
            numbers = torch.arange(first, first + size)
            image = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, self.side, self.side, 1).contiguous()
            map_ = (numbers % 4).to(torch.int8).view(-1, 1, 1).expand(-1, self.side, self.side).contiguous()
            return Split({"image": image, self.name: (numbers % 4).to(torch.uint8), "map": map_})

        return {"train": split(self.size, self.first), "test": split(5, self.first + 80)}


def union(**options):
    """Three parts of 12, 5 and 1 samples, with numbers from 0, 20 and 40."""
    parts = {
        "long": Pictures(size=12, name="a", batch_size=4, views=options.pop("views", ())),
        "short": Pictures(size=5, first=20, name="b", batch_size=2),
        "one": Pictures(size=1, first=40, name="c", batch_size=1),
    }
    return Union(parts=parts, workers=0, **options)


def epochs(benchmark, count=1, seed=0, split="train"):
    train = TrainingBatches(benchmark.splits()[split], benchmark, CPU, seed)
    return [list(train.epoch(k)) for k in range(count)]


def numbers(batch):
    return (batch["image"][:, 0, 2, 2] * 255).round().long()


def check_labels(batch):
    found = numbers(batch)
    for name, low, high in (("a", 0, 20), ("b", 20, 40), ("c", 40, 80)):
        own = (found >= low) & (found < high)
        assert torch.equal(batch[name].long(), torch.where(own, found % 4, -100))
    assert torch.equal(batch["map"][:, 2, 2].long(), found % 4)  # a task of all three parts


def test_samples_have_the_labels_of_their_own_part():
    benchmark = union()
    assert [t.name for t in benchmark.tasks] == ["a", "map", "b", "c"] and benchmark.batch_size == 7
    splits = benchmark.splits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "test": 15}
    (batches,) = epochs(benchmark)
    for batch in batches:
        check_labels(batch)
    assert sorted(torch.cat([numbers(b) for b in batches]).tolist()) == [*range(12), *range(20, 25), 40]
    for batch in EvaluationBatches(splits["test"], benchmark, CPU):
        found = numbers(batch)
        assert torch.equal(batch["a"] >= 0, found < 100) and torch.equal(
            batch["b"] >= 0, (found >= 100) & (found < 120)
        )


def test_no_image_is_copied_when_parts_are_joined():
    member = Pictures()
    loaded = {name: split for name, split in member.load().items()}
    member.load = lambda: loaded
    image = Union(parts={"x": member, "y": Pictures(name="b")}).splits()["train"].columns["image"]
    assert isinstance(image, Joined) and image.parts[0].data_ptr() == loaded["train"].columns["image"].data_ptr()


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"views": (Crop(1), Flip())}, {"views": (ScaleCrop(),)},
                                     {"label_fraction": 0.5, "val_fraction": 0.2}])  # fmt: skip
def test_all_residencies_give_the_same_batches(options):
    found = []
    for residency, workers in (("device", 0), ("host", 0), ("host", 2)):
        benchmark = union(residency=residency, **options)
        benchmark.workers = workers
        found.append([batch for epoch in epochs(benchmark, 2, seed=3) for batch in epoch])
    assert len(found[0]) == len(found[1]) == len(found[2])
    for a, b, c in zip(*found, strict=True):
        assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)


def test_balanced_batches_hold_a_share_of_each_part():
    every = epochs(union(balanced=True), 6)
    assert all(len(batches) == 3 for batches in every)  # 12 samples, 4 at a time
    seen = {0: [], 1: [], 2: []}
    for batch in (batch for batches in every for batch in batches):
        check_labels(batch)
        found = numbers(batch)
        part = found // 20
        assert part.bincount().tolist() == [4, 2, 1]
        assert {0, 1} <= set(part[:3].tolist()) and {0, 1} <= set(part[4:].tolist())  # both halves have both
        for p in seen:
            seen[p] += found[part == p].tolist()
    assert [seen[0][i : i + 12] for i in (0, 60)] != [sorted(range(12))] * 2
    for p, own in ((0, range(12)), (1, range(20, 25)), (2, [40])):  # one permutation after another
        passes = [seen[p][i : i + len(own)] for i in range(0, len(seen[p]) - len(own) + 1, len(own))]
        assert all(sorted(one) == list(own) for one in passes)
    again = epochs(union(balanced=True), 6)[5]  # a resumed run begins anywhere
    assert all(torch.equal(numbers(a), numbers(b)) for a, b in zip(again, every[5], strict=True))
    other = epochs(union(balanced=True), 1, seed=1)[0]
    assert not all(torch.equal(numbers(a), numbers(b)) for a, b in zip(other, every[0], strict=True))


def test_each_part_keeps_its_own_views():
    plain, seen = (epochs(union(views=views), 1, seed=5)[0] for views in ((), (Crop(2),)))
    moved = 0
    for a, b in zip(plain, seen, strict=True):
        same = (a["image"] == b["image"]).flatten(1).all(1)
        first = (a["image"][:, 0, 2, 2] * 255).round() < 20
        assert same[~first].all()
        moved += int((~same[first]).sum())
    assert moved > 6  # of 12: a crop shows black pixels, unless it is the whole picture


def test_two_parts_may_be_limited_and_held_out():
    benchmark = Union(
        parts={"x": Pictures(val_fraction=0.25, limit_train=8), "y": Pictures(name="b", val_fraction=0.5)}
    )
    assert {n: len(s) for n, s in benchmark.splits().items()} == {"train": 6 + 6, "val": 2 + 6, "test": 10}
    first = Union(parts={"x": Pictures(size=30), "y": Pictures(name="b", size=15)}, limit_train=9).splits()["train"]
    assert first.column(PART).bincount().tolist() == [6, 3]  # in proportion


def test_tasks_of_one_name_that_differ_become_two():
    parts = {"x": Pictures(), "y": Table(), "z": Pictures(name="b")}
    with pytest.raises(ConfigError, match="the network reads image of x, and x of y"):
        Union(parts=parts).inputs  # noqa: B018
    parts = {"x": Pictures(), "y": Pictures(name="b", classes=5)}
    with pytest.raises(ConfigError, match="x and y both have a task 'map', with other labels"):
        Union(parts=parts).tasks  # noqa: B018
    two = Union(parts=parts, separate=True)
    assert [t.name for t in two.tasks] == ["x_a", "x_map", "y_b", "y_map"]
    batch = next(iter(EvaluationBatches(two.splits()["test"], two, CPU)))
    assert torch.equal(batch["x_map"][:, 0, 0] >= 0, batch["y_map"][:, 0, 0] < 0)


# ------------------------------------------------------------------------------------------------------------- the step


def test_a_step_on_parts_is_the_mean_over_each_part():
    """By hand: each part by itself, the mean of its task's losses over its own samples; then the sum."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(2, 4).double(), nn.ModuleList(nn.Linear(4, 3).double() for _ in range(3))
    x, part = torch.randn(9, 2).double(), torch.tensor([0, 1, 0, 2, 0, 1, 0, 1, 0])
    tasks = [Classification(name, 3) for name in "abc"]
    label = torch.arange(9) % 3
    columns = [torch.where(part == p, label, -100) for p in range(3)]

    def losses(rows):
        return [t.loss(h(trunk(x[rows]).tanh()), c[rows]) for t, h, c in zip(tasks, heads, columns, strict=True)]

    parameters = [*trunk.parameters(), *heads.parameters()]
    total = sum(nn.functional.cross_entropy(heads[p](trunk(x[part == p]).tanh()), label[part == p]) for p in range(3))
    wanted = torch.autograd.grad(total, parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    labelled = torch.stack([t.labelled(c) for t, c in zip(tasks, columns, strict=True)], 1)
    mtl.Step(mtl.losses.Equal(3), optimizer, trunk, list(heads))(losses, 9, labelled)
    found = [(b - p.detach()) / 0.1 for b, p in zip(before, parameters, strict=True)]
    torch.testing.assert_close(found, list(wanted))


# The weight of a task that is alone is not 1: it is learned, fixed, or a function of its own loss or gradient. Only the
# direction of the step is the task's own.
SCALED = {
    "annealed_boosted", "annealed_calibrated", "auto_lambda", "cagrad", "consmtl", "db_mtl", "fairgrad", "moco", "modo",
    "nash_mtl", "ntkmtl", "pivrg", "scale_invariant", "sdmgrad", "static", "stch", "uncertainty_optimal",
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_one_task_alone_is_trained_along_its_own_gradient(name):
    only = torch.tensor([False, True, False])
    strategy, net = make(name), Net()
    strategy.look_ahead(lambda k: torch.stack(net(k)[0]), net.parameters(), 0.0, only)
    parts, features = zip(*(net(k, strategy.views) for k in range(strategy.samples)), strict=True)
    given = parts[0] if strategy.samples == 1 else parts
    mtl.backward(given, strategy, [net.trunk], [[h] for h in net.heads], only, features[0])
    found, fresh = net.trunk.grad.flatten(), Net()
    rows = [torch.autograd.grad(fresh(k)[0][1], fresh.trunk)[0].flatten() for k in range(strategy.samples)]
    own = rows[-1] if name == "sdmgrad" else torch.stack(rows).mean(0)  # its first two parts choose the weights only
    assert float(torch.cosine_similarity(found, own, 0)) == pytest.approx(1)
    if name not in SCALED:
        torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-9)
    assert not any(h.grad is not None and h.grad.any() for h in (net.heads[0], net.heads[2]))


# ----------------------------------------------------------------------------------------------------- the command line

UNION = (
    "data=union", "arch=resnet20", "logger=none", "trainer.epochs=2", "trainer.device=cpu",
    "data.parts=[digits]", "data.parts.digits.limit_train=24", "data.parts.digits.limit_test=8", "data.workers=0",
    "data.parts.more={_target_: mtl.data.digits.Digits, limit_train: 12, limit_test: 8}", "data.separate=true",
    "data.batch_size=16", "data.balanced=true", "loss=pcgrad", "data.label_fraction={more_ink: 0.5}",
)  # fmt: skip


def test_a_union_trains_resumes_bit_for_bit_and_says_its_parts(cli, tmp_path, monkeypatch):
    words = list(UNION)
    assert cli(*words, "output_root=whole").code == 0
    real, calls = TrainingBatches.epoch, []

    def stopped(self, epoch):
        calls.append(epoch)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return real(self, epoch)

    monkeypatch.setattr(TrainingBatches, "epoch", stopped)
    assert cli(*words, "output_root=parts").code == 130
    assert cli(*words, "output_root=parts").code == 0 and calls == [0, 1, 1]
    (one,), (two,) = (list(tmp_path.glob(f"{root}/**/metrics.jsonl")) for root in ("whole", "parts"))
    assert "union-digits-more" in str(one)
    drop = lambda row: {k: v for k, v in row.items() if not k.startswith("time/")}  # noqa: E731
    rows = [[drop(json.loads(line)) for line in file.read_text().splitlines()] for file in (one, two)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    states = [torch.load(f.with_name("last.pt"), weights_only=False) for f in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["model"].values(), states[1]["model"].values(), strict=True))
    again = cli("--config-dir", str(one.parent), "--config-name", "config", "output_root=whole")  # its saved config
    assert again.code == 0 and len(list(tmp_path.glob("whole/**/metrics.jsonl"))) == 1


WRONG = [
    (["data.parts=[rooms,synthetik]"], "data.parts: synthetik is no data option"),
    (["data.parts=[rooms,rooms]"],
     "data.parts: rooms is listed twice; two parts of one kind need names: data.parts={NAME: {_target_: "),
    (["data.parts=[digits,coco,nyuv2]", "data.root=x"],
     "mean data.parts.coco.root and data.parts.nyuv2.root, or the environment variable MTL_DATA for all parts?"),
    (["data.parts=[rooms,digits]", "data.height=32"], "workers; did you mean data.parts.rooms.height?"),
    (["data.parts=[rooms,digits]", "+data.height=32"], "workers; did you mean data.parts.rooms.height?"),
    (["data.parts=3"], "data.parts: a list of data options is needed, as in data.parts=[synthetic,rooms]"),
    (["data.parts={rooms: 4}"], "data.parts.rooms=4: a mapping of the part's options is needed"),
    (["data.parts=[rooms]", "data.parts.rooms.hight=3"], "data.parts.rooms.hight: unknown key"),
    (["data.parts=[rooms]", "data.parts.rooms.workers=3"], "data.parts.rooms.workers: all parts are read together"),
    (["data.parts=[rooms,digits]"], "image is Image of the shape (3, 48, 64) in rooms, and"),
    (["data.parts=[synthetic,cifar100]"],
     "image is normalised differently in synthetic and cifar100; set data.mean and data.std"),
    (["data.parts=[rooms]", "data.label_fraction={dept: 0.1}"], "there is no task 'dept'"),
    (["data.parts=[rooms,synthetic]", "data.balanced=true", "data.batch_size=3"],
     "data.batch_size: 3 samples cannot be divided into 2 equal parts"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_what_cannot_be_joined_is_refused_in_one_line(cli, words, message):
    found = cli("data=union", "logger=none", *words)
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize(("second", "message"), [
    (("rows", 50, 4), "data.parts: row is normalised differently in a and b; write both into one table, where an empty "
     "cell is a missing label, or give both the same mean and std"),
    (("photos", 0.5, 0.25), "data.parts: image is normalised differently in a and b; set data.mean and data.std"),
])  # fmt: skip
def test_two_tables_with_different_statistics_are_refused(cli, tmp_path, monkeypatch, second, message):
    kind, mean, std = second
    monkeypatch.chdir(tmp_path)
    images, classes = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2
    for name, (first, scale) in {"a": (0, 1), "b": (mean, std)}.items():
        column = {"x": first + scale * np.arange(20.0)} if kind == "rows" else {"photo": images}
        np.savez(f"{name}.npz", **column, **{f"kind_{name}": classes})
    own = (
        {"a": "", "b": ""}
        if kind == "rows"
        else {"a": "image: photo,", "b": f"image: photo, mean: [{mean}], std: [{std}],"}
    )
    node = "{_target_: mtl.data.table.DataTable, file: %s.npz, %s labels: {kind_%s: class}}"
    parts = ", ".join(f"{name}: {node % (name, keys, name)}" for name, keys in own.items())
    words = ["data=union", f"data.parts={{{parts}}}", "logger=none", "trainer.epochs=1", "arch.width=2"]
    words.append("arch=mlp" if kind == "rows" else "arch=fcn")
    found = cli(*words)
    assert found.code == 2 and found.err == f"error: {message}\n"
    if kind == "photos":  # the cure in the message
        cured = cli(*words, "data.mean=[0.5]", "data.std=[0.25]")
        assert cured.code == 0, cured.err


def test_identity_knows_no_folder_of_a_built_in_part():
    def digest(parts, **options):
        data = {"_target_": "mtl.data.union.Union", "parts": parts, **options}
        config = {"data": data, "seed": 0, **{n: {"_target_": f"x.{n}"} for n in ("arch", "loss")}}
        found = identify(config, {"data": "union"})
        return found.data, found.digest

    one = {"_target_": "mtl.data.nyuv2.NYUv2", "root": "/here", "cache": None, "label_fraction": 1.0}
    base = digest({"nyuv2": one})
    assert base[0] == "union-nyuv2"
    assert base == digest({"nyuv2": one | {"root": "/there", "cache": "/tmp"}}, label_fraction=1.0, residency="host")
    assert base != digest({"nyuv2": one | {"label_fraction": 0.5}})
    own = one | {"_target_": "my_data.Mine"}
    assert digest({"mine": own}) != digest({"mine": own | {"root": "/there"}})


def test_a_union_of_files_is_named_after_their_content_and_predicts_without_them(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i % 5},{i % 3},{'owl' if i % 2 else 'jay'},{30 + i}\n" for i in range(40))
    (tmp_path / "birds.csv").write_text("a,b,kind,weight\n" + rows)
    (tmp_path / "nests.csv").write_text("a,b,size\n" + "".join(f"{i % 5},{i % 3},{i % 2}\n" for i in range(40)))
    node = "{_target_: mtl.data.table.DataTable, file: %s.csv, labels: {%s}}"
    parts = f"birds: {node % ('birds', 'kind: class, weight: number')}, nests: {node % ('nests', 'size: class')}"
    words = ["data=union", f"data.parts={{{parts}}}", "arch=mlp", "arch.width=8", "trainer.epochs=1", "logger=none"]
    assert (first := cli(*words)).code == 0, first.err
    (run,) = tmp_path.rglob("run.json")
    notes = json.loads(run.read_text())
    assert notes["facts"]["birds"]["labels"]["kind"] == ["jay", "owl"]
    assert set(notes["own"]["data"]) == {"parts.birds.file", "parts.nests.file"}
    # A moved file is the same data, and another content is not.
    (tmp_path / "birds.csv").rename(tmp_path / "moved.csv")
    moved = [word.replace("birds.csv", "moved.csv") for word in words]
    assert "finished" in cli(*moved).out and len(list(tmp_path.rglob("run.json"))) == 1
    (tmp_path / "nests.csv").write_text((tmp_path / "nests.csv").read_text() + "1,1,0\n")
    for name in ("moved.csv", "nests.csv"):
        (tmp_path / name).unlink()
    assert (gone := cli(*words)).code == 2 and "data.parts.birds.file=birds.csv: No such file" in gone.err
    loaded = load(run.parent)
    found = loaded.predict({"row": torch.tensor([[1.0, 2.0], [0.0, 1.0]])})
    assert set(found["kind"]["class"].tolist()) <= {0, 1} and loaded.benchmark.tasks[0].named("class") == ("jay", "owl")
    assert (found["weight"]["number"] - 50).abs().max() < 60 and found["weight"]["number"].min() > 10
    (tmp_path / "new.csv").write_text("b,a\n2,1\n")
    assert predict([str(run.parent), "new.csv", "--out", "out.csv"]) == 0
    header, line = (tmp_path / "out.csv").read_text().splitlines()
    assert header.split(",")[1] == "kind_class" and line.split(",")[1] in ("jay", "owl")


# --------------------------------------------------------------------------------------------------------------- Office


@pytest.fixture
def office(tmp_path):
    from PIL import Image as Pillow

    for d, (domain, count) in enumerate((("amazon", 10), ("dslr", 5))):
        for c, kind in enumerate(("bike", "mug")):
            folder = tmp_path / domain / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Pillow.new("RGB", (9 + i, 7), (100 * d, 100 * c, 10 * i)).save(folder / f"{i}.png")
    return tmp_path


def make_office(root, **options):
    return Office(root=str(root), domains=["amazon", "dslr"], classes=2, size=8, batch_size=4, workers=0, **options)


def test_each_domain_is_a_task_on_its_own_images(office):
    benchmark = make_office(office)
    splits = benchmark.splits()
    assert {n: s.column(PART).bincount().tolist() for n, s in splits.items()} == {
        "train": [12, 6], "val": [4, 2], "test": [4, 2]
    }  # fmt: skip
    columns = splits["train"].batch(slice(None))
    colour = columns["image"][:, 4, 4].long()
    for p, name in enumerate(("amazon", "dslr")):
        assert torch.equal(columns[name], torch.where(colour[:, 0] == 100 * p, colour[:, 1] // 100, -100))
    seen = [tuple(s.column("image")[:, 4, 4][i].tolist()) for s in splits.values() for i in range(len(s))]
    assert len(set(seen)) == len(seen) == 30  # no image is in two splits
    (batches,) = epochs(benchmark)
    assert len(batches) == 6  # 12 of amazon, two at a time
    assert all(int((b["dslr"] >= 0).sum()) == int((b["amazon"] >= 0).sum()) == 2 for b in batches)


def test_lists_of_files_are_the_splits(office):
    for split, lines in (("train", "amazon/bike/3.png\namazon/mug/1.png\ndslr/mug/2.png\n"),
                         ("val", "dslr/bike/0.png\namazon/mug/0.png\n")):  # fmt: skip
        (office / f"{split}.txt").write_text(lines)
    with pytest.raises(SetupError, match=r"test.txt is missing; without all three lists"):
        make_office(office).splits()
    (office / "test.txt").write_text("dslr/bike/1.png\namazon/mug/2.png\n")
    train = make_office(office).splits()["train"].batch(slice(None))
    assert sorted(map(tuple, train["image"][:, 4, 4].tolist())) == [(0, 0, 30), (0, 100, 10), (100, 100, 20)]
    (office / "test.txt").write_text("dslr/bike/1.png\namazon/mug/77.png\n")
    with pytest.raises(SetupError, match=r"test.txt, line 2: there is no image amazon/mug/77.png"):
        make_office(office).splits()
    # A line that names no folder beside the list would silently take an image away.
    (office / "webcam").mkdir()
    for line in ("webcam/bike/1.png", "", "Amazon/bike/1.png"):
        (office / "test.txt").write_text(f"dslr/bike/1.png\namazon/mug/2.png\n{line}\n")
        if line != "Amazon/bike/1.png":
            make_office(office).splits()  # another domain, which this run does not train on
    with pytest.raises(SetupError, match=r"test.txt, line 3: there is no image Amazon/bike/1.png"):
        make_office(office).splits()


def test_wrong_folders_are_named(office, tmp_path):
    with pytest.raises(SetupError, match=r"Office is not in data.root=.*looked for amazon/"):
        make_office(tmp_path / "nowhere").splits()
    (office / "dslr" / "cup").mkdir()
    with pytest.raises(SetupError, match="the class cup is in only one of amazon, dslr"):
        make_office(office).splits()
    with pytest.raises(SetupError, match=r"data.classes=3: .*amazon has 2 folders"):
        Office(root=str(office), domains=["amazon"], classes=3).splits()
