"""Alike tasks are computed together: as many operations as one task, and the same numbers as each one by itself."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtl
from mtl.archs.check import check_model, check_owners
from mtl.archs.model import ArchError, HardSharing
from mtl.data.check import check_declared, check_loaded, check_tasks
from mtl.data.columns import Split
from mtl.data.digits import Digits
from mtl.data.inputs import Numbers
from mtl.engine.gradients import jacobian
from mtl.engine.learner import Learner
from mtl.engine.loaded import load
from mtl.errors import SetupError
from mtl.evaluate import evaluate
from mtl.losses import PCGrad, Strategy
from mtl.metrics.base import Metric, Score
from mtl.metrics.labels import Accuracy
from mtl.metrics.tally import Tally
from mtl.tasks import Classification, Regression, Task, alike
from mtl.tasks.groups import Groups, places_of_alike

K, N, F = 40, 24, 16
NAMES = [f"a{i}" for i in range(K)]
KINDS = {
    "classification": (alike(Classification, NAMES, outputs=3, target="y"),
                       lambda g: torch.randint(3, (N, K), generator=g)),
    "regression": (alike(Regression, NAMES, target="y"), lambda g: torch.randn(N, K, generator=g)),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


class Calls(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.__name__] += 1
        return function(*args, **(kwargs or {}))


class Net(nn.Module):
    inputs, out_features = ("x",), F

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, F)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def batch_of(kind: str, missing: bool = False) -> tuple[tuple[Task, ...], dict[str, Tensor]]:
    tasks, labels = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    y = labels(generator)
    if missing:
        y[torch.rand(N, K, generator=generator) < 0.4] = -100 if kind == "classification" else math.nan
        y[:, 7] = -100 if kind == "classification" else math.nan  # a task without any label
    return tasks, {"x": torch.randn(N, 5, generator=generator), "y": y}


def apart(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """The same tasks with a column each."""
    return tuple(replace(task, target=task.name, index=None) for task in tasks)


@every_kind
def test_forty_tasks_in_a_hundred_operations(kind):
    """Forward pass of the heads, losses, numbers of labels, marks, metrics: each in one go."""
    tasks, batch = batch_of(kind, missing=True)
    model, groups, tally = HardSharing(Net(), tasks), Groups(tasks), Tally()
    update = torch.no_grad()(groups.update)
    update(model(batch).predictions, batch, tally)  # the first update tries what the metrics can do
    with Calls() as calls:
        predictions, units = model(batch).predictions, groups.units(batch)
        groups.losses(predictions, batch, units)
        groups.counts(units)
        groups.labelled(units)
        update(predictions, batch, tally)
    assert sum(calls.names.values()) <= 100, calls.names


def step_of(strategy: Strategy, tasks: tuple[Task, ...], batch: dict[str, Tensor]) -> tuple[mtl.Step, Callable]:
    """A step, and the function that computes its losses."""
    torch.manual_seed(0)
    model, groups = HardSharing(Net(), tasks), Groups(tasks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heads = [list(model.own_parameters(task.name)) for task in tasks]
    step = mtl.Step(strategy, optimizer, model.backbone, heads, model=model)
    return step, lambda part: groups.losses(model(batch).predictions, batch)


def test_a_gradient_method_takes_fewer_operations_than_with_tasks_apart():
    """Of forty tasks: every backward pass would otherwise go through forty rows. The first step checks the owners."""
    found = []
    for kind in (lambda tasks: tasks, apart):
        tasks, batch = batch_of("classification")
        tasks, batch = kind(tasks), batch | {task.name: batch["y"][:, i] for i, task in enumerate(tasks)}
        step, forward = step_of(PCGrad(NAMES), tasks, batch)
        counts = []
        for _ in range(3):
            with Calls() as calls:
                step(forward, N)
            counts.append(sum(calls.names.values()))
        found.append(counts)
    together, single = found
    assert together[2] < 0.9 * single[2] and together[0] < 5000, found


@pytest.mark.parametrize(("fault", "message"), [
    ("order", r"heads\[\d+\]: the loss of task a\d+ reaches none of its parameters"),
    ("leak", r"heads\[3\]: its parameter of shape .* is also reached by the loss of task a7"),
])  # fmt: skip
def test_a_wrong_owner_among_forty_tasks_is_found(fault, message):
    tasks, batch = batch_of("regression")
    step, forward = step_of(PCGrad(NAMES), tasks, batch)

    def losses(part: slice) -> list[Tensor]:
        found = forward(part)
        if fault == "order":
            return found[::-1]
        return [loss + 0.1 * found[3] if i == 7 else loss for i, loss in enumerate(found)]

    with pytest.raises(ValueError, match=message):
        step(losses, N)


def test_a_prediction_that_a_model_replaces_counts():
    tasks, batch = batch_of("regression")
    predictions, groups = HardSharing(Net(), tasks)(batch).predictions, Groups(tasks)
    before = groups.losses(predictions, batch)
    predictions[5] = predictions[5] * 0
    after = groups.losses(predictions.each(Tensor.float), batch)
    expected = tasks[5].loss(torch.zeros(N, 1), batch["y"][:, 5])
    torch.testing.assert_close(after, [*before[:5], expected, *before[6:]])


@every_kind
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("order", ["as in the matrix", "mixed"])
def test_a_group_equals_its_tasks_one_by_one(kind, missing, order):
    """Predictions, losses and their gradients, counts, marks, sums and metrics."""
    tasks, batch = batch_of(kind, missing)
    if order == "mixed":  # a part of the columns, in another order, with another task in between
        other = Regression("other", target="x", index=2)
        tasks = (*tasks[5:9], other, tasks[30], tasks[3])
        assert places_of_alike(tasks) == [[0, 1, 2, 3, 5, 6], [4]]
    torch.manual_seed(0)
    model, groups = HardSharing(Net(), tasks), Groups(tasks)
    features = model.backbone(batch["x"])
    alone = [head(features) for head in model.heads.values()]
    together = model(batch).predictions
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    labels = [task.select(batch[task.column]) for task in tasks]
    found = groups.losses(together, batch)
    expected = [task.loss(p, y) for task, p, y in zip(tasks, alone, labels, strict=True)]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for k, task in enumerate(tasks):
        where = [*model.shared_parameters(), *model.own_parameters(task.name)]
        gradients = (torch.autograd.grad(x[k], where, retain_graph=True) for x in (found, expected))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    units = groups.units(batch)
    assert all(map(torch.equal, groups.losses(together, batch, units), found))
    assert torch.equal(groups.counts(units), torch.stack([t.count(y) for t, y in zip(tasks, labels, strict=True)]))
    assert torch.equal(
        groups.labelled(units), torch.stack([t.labelled(y) for t, y in zip(tasks, labels, strict=True)], 1)
    )
    sums = [t.criterion(p, y).sum() for t, p, y in zip(tasks, alone, labels, strict=True)]
    torch.testing.assert_close(groups.sums(together, batch), torch.stack(sums), rtol=1e-5, atol=1e-5)
    tally = Tally()
    with torch.no_grad():
        groups.update(together, batch, tally)
        groups.update(together, batch, tally)
    read = tally.read()
    for k, task in enumerate(tasks):
        for metric in task.metrics:
            state = metric.zero()
            for _ in range(2):
                metric.update(state, alone[k].detach(), labels[k])
            assert groups.scores(k, read) == pytest.approx(metric.compute(state.double()), nan_ok=True, rel=1e-6)


def test_only_what_differs_in_name_and_index_is_alike():
    same, other = alike(Classification, ["a", "b"], outputs=2, target="y"), Classification("c", 3, "y", index=2)
    elsewhere, whole = Classification("d", 2, "z", index=0), Classification("e", 2, "y")
    assert places_of_alike([*same, other, elsewhere, whole]) == [[0, 1], [2], [3], [4]]
    assert [(t.name, t.index, t.column) for t in same] == [("a", 0, "y"), ("b", 1, "y")]


class Slow(Accuracy):
    """Reads a value on the host, which vmap cannot."""

    def add(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if (target == 0).all():
            return target.sum(), torch.tensor(len(target))
        return super().add(prediction, target)


@dataclass(frozen=True)
class WithSlow(Classification):
    metrics = (Slow(),)


def test_a_metric_that_vmap_cannot_run_is_updated_task_by_task():
    tasks, batch = alike(WithSlow, NAMES, outputs=3, target="y"), batch_of("classification", missing=True)[1]
    predictions, tally = [torch.randn(N, 3) for _ in tasks], Tally()
    groups = Groups(tasks)
    for _ in range(2):
        groups.update(predictions, batch, tally)
    read = tally.read()
    for k, task in enumerate(tasks):
        state = Accuracy().zero()
        Accuracy().update(state, predictions[k], task.select(batch["y"]))
        assert groups.scores(k, read) == pytest.approx(Accuracy().compute(state), nan_ok=True)


@dataclass(frozen=True)
class OfTheBatch(Regression):
    """The loss of a sample depends on the other samples: not what `criterion` promises."""

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().criterion(prediction - prediction.mean(), target)


class ByName(Metric):
    scores = (Score("x"),)

    def __init__(self, factor: int):
        self.factor = factor

    def zero(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        state += self.factor * (~target.isnan()).sum()

    def compute(self, state: Tensor) -> dict[str, float]:
        return {"x": state.item()}


@dataclass(frozen=True)
class Own(Regression):
    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (ByName(1 if self.name == "a0" else 2),)


@pytest.mark.parametrize(("kind", "what"), [(OfTheBatch, "loss"), (Own, "metric ByName")])
def test_a_task_that_would_get_other_numbers_is_refused(kind, what):
    tasks, batch = alike(kind, ["a0", "a1"], target="y"), batch_of("regression")[1]
    with pytest.raises(SetupError, match=rf"task 'a[01]': its {what} is another one when it is computed together"):
        check_tasks(tasks, [torch.randn(N, 1), torch.randn(N, 1)], batch)
    single = tuple(replace(task, target=task.name, index=None) for task in tasks)
    check_tasks(single, [torch.randn(N, 1)] * 2, {t.name: batch["y"][:, i] for i, t in enumerate(single)})


def loaded(tasks: tuple[Task, ...], y: Tensor) -> None:
    benchmark = SimpleNamespace(inputs={"x": Numbers((5,))}, tasks=tasks, augment=())
    check_declared(benchmark)
    split = Split({"x": torch.zeros(len(y), 5), "y": y})
    check_loaded(benchmark, {"train": split, "test": split})


@pytest.mark.parametrize(("tasks", "y", "message"), [
    (alike(Classification, ["a", "b", "c"], outputs=2, target="y"), torch.zeros(4, 2).long(),
     r"labels of task 'c': shape \(4, 2\); index=2 needs a matrix \(N, K\) with K from 3"),
    (alike(Classification, ["a", "b"], outputs=2, target="y"), torch.tensor([[0, 1], [0, 5]]),
     r"labels of task 'b': sample 1 has the label 5; a class must be an integer from 0 to 1"),
    ((Classification("a", 2, "y"),), torch.zeros(4, 2).long(), r"with index=k, a task reads one column of a matrix"),
])  # fmt: skip
def test_wrong_matrices_are_refused(tasks, y, message):
    with pytest.raises(SetupError, match=message):
        loaded(tasks, y)


@pytest.mark.parametrize("index", [-1, "a", 1.5])
def test_a_wrong_index_is_refused(index):
    with pytest.raises(ValueError, match=rf"a has index={index!r}; the number of a column"):
        loaded((Classification("a", 2, "y", index=index),), torch.zeros(4, 2).long())


def test_every_head_keeps_its_owner():
    """The heads are multiplied together, but each is reached by its own task only, and begins as it did."""
    tasks, batch = batch_of("classification")
    torch.manual_seed(1)
    model = HardSharing(Net(), tasks)
    torch.manual_seed(1)
    single = HardSharing(Net(), apart(tasks))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), single.parameters(), strict=True))
    assert list(model.state_dict()) == list(single.state_dict())
    check_model(model, {"x": batch["x"]}, NAMES)


def test_the_check_of_forty_owners_goes_through_the_backbone_a_few_times():
    tasks, batch = batch_of("classification")
    model, passes = HardSharing(Net(), tasks), []
    model.backbone.layer.weight.register_hook(lambda _: passes.append(1))
    check_owners(model, {"x": batch["x"]}, NAMES)
    assert len(passes) == 2  # in training and in evaluation mode
    for p in model.heads["a3"].parameters():
        p.requires_grad_(False)
    check_owners(model, {"x": batch["x"]}, NAMES)
    swapped = {"a3": "a4", "a4": "a3"}
    model.own_parameters = lambda task: model.heads[swapped.get(task, task)].parameters()
    with pytest.raises(ArchError, match=r"heads.a4.weight is declared task 'a3''s own, but task 'a4' uses it"):
        check_owners(model, {"x": batch["x"]}, NAMES)


def test_a_hook_on_a_head_still_runs():
    tasks, batch = batch_of("classification")
    model, seen = HardSharing(Net(), tasks), []
    model.heads["a3"].register_forward_hook(lambda *_: seen.append(1))
    model(batch)
    assert seen == [1]


class Smooth(nn.Module):
    """No ReLU, whose kink would part two trainings that differ by rounding."""

    out_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 12)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image.flatten(1)).tanh()


class Together(Digits):
    """Ten questions about a digit: is it a 0, a 1, …? Some labels are missing, and all of one task."""

    tasks = alike(Classification, NAMES[:10], outputs=2, target="y")

    def load(self) -> dict[str, Split]:
        found = {}
        for name, split in super().load().items():
            y = (split.column("digit")[:, None] == torch.arange(10)).long()
            y[::3, 1], y[:, 4] = -100, -100
            found[name] = Split({"image": split.column("image"), "y": y, **dict(zip(NAMES, y.T, strict=False))})
        return found


class Apart(Together):
    tasks = apart(Together.tasks)


def rows_of(cli, *words: str) -> list[dict]:
    found = cli("data=digits", "~arch.depth", f"arch._target_={__name__}.Smooth", "data.limit_train=64", "seed=1",
                "data.limit_test=30", "data.batch_size=32", "data.val_fraction=0.2", "trainer.epochs=2",
                "microscope.every=1", "microscope.samples=2", "trainer.device=cpu", "logger=none", *words)  # fmt: skip
    assert found.code == 0, found.err
    (file,) = Path("outputs").rglob("metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    shutil.rmtree("outputs")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.parametrize("loss", ["equal", "sdmgrad", "rotograd"])
def test_a_run_of_alike_tasks_equals_the_run_of_single_ones(loss, cli):
    """With missing labels, an absent task, validation data and the microscope: every number of two epochs."""
    together, single = (
        rows_of(cli, f"loss={loss}", f"data._target_={__name__}.{name}") for name in ("Together", "Apart")
    )
    for a, b in zip(together, single, strict=True):
        assert list(a) == list(b)
        assert [k for k in a if a[k] is None] == [k for k in b if b[k] is None] != []
        a, b = ({k: v for k, v in row.items() if v is not None} for row in (a, b))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_a_loaded_run_evaluates_and_predicts_each_task(cli):
    assert cli("data=digits", "~arch.depth", f"arch._target_={__name__}.Smooth", "data.limit_train=64",
               "trainer.epochs=1", "loss=dwa", f"data._target_={__name__}.Together",
               "trainer.device=cpu", "logger=none").code == 0  # fmt: skip
    (file,) = Path("outputs").rglob("run.json")
    found = evaluate(file.parent, {}, device="cpu")
    row = json.loads((file.parent / "metrics.jsonl").read_text())
    keys = [f"test/{name}_{what}" for name in NAMES[:10] for what in ("loss", "accuracy")]
    expected = {key: math.nan if row[key] is None else row[key] for key in keys}
    assert found.figures == pytest.approx(expected, nan_ok=True)
    answers = load(file.parent).predict(torch.zeros(3, 8, 8, 1, dtype=torch.uint8))
    assert list(answers) == NAMES[:10] and all(a["class"].shape == (3,) for a in answers.values())


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("cut", ["unbind", "backwards", "every_second", "shifted"])
def test_elements_of_one_vector_have_the_gradients_of_separate_losses(cut, scale):
    """Their passes start at the vector. A part of it, another order, or a vector that is a view changes nothing."""
    torch.manual_seed(0)
    shared, heads = nn.Linear(3, 4).double(), [nn.Linear(4, 1).double() for _ in range(6)]
    features = shared(torch.randn(5, 3, dtype=torch.float64)).tanh()
    vector = torch.stack([head(features).square().mean() for head in heads]).exp()
    order = {"unbind": range(6), "backwards": [5, 1, 0], "every_second": [0, 2, 4], "shifted": [2, 3]}[cut]
    losses = {
        "unbind": lambda: vector.unbind(), "backwards": lambda: [vector[i] for i in order],
        "every_second": lambda: vector[::2].unbind(), "shifted": lambda: vector[2:4].unbind(),
    }[cut]()  # fmt: skip
    where, own = list(shared.parameters()), [list(heads[i].parameters()) for i in order]
    expected = [torch.autograd.grad(vector[i], [*where, *own[k]], retain_graph=True) for k, i in enumerate(order)]
    rows, found, reached = jacobian(losses, where, own, True, scale)
    assert all(reached)
    for k, (wanted, head) in enumerate(zip(expected, found, strict=True)):
        torch.testing.assert_close(rows[k], torch.cat([g.flatten() for g in wanted[:2]]), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(head, [g * (scale or 1) for g in wanted[2:]], rtol=1e-12, atol=1e-14)


def test_a_step_counts_its_labels_once(smoke, monkeypatch):
    """For the marks, the losses and the sums, also where some labels are missing."""
    called, found, units, train = [], [], Classification.units, Learner.train_epoch

    def counted(self, target):
        called.append(self.name)
        return units(self, target)

    def watched(self, batches, epoch):
        called.clear()
        row = train(self, batches, epoch)
        found.append(len(called) / len(batches) / len(self.tasks))
        return row

    monkeypatch.setattr(Classification, "units", counted)
    monkeypatch.setattr(Learner, "train_epoch", watched)
    assert smoke("loss=pcgrad", "data.label_fraction=0.9").code == 0
    assert found and set(found) == {1.0}


def test_a_tasks_own_loss_of_two_arguments_trains():
    """Training counts the labels itself, but a user's class need not know."""

    class Twice(Classification):
        def loss(self, prediction, target):
            return 2 * super().loss(prediction, target)

    batch = {"a": torch.tensor([0, -100, 2]), "b": torch.tensor([1, 1, -100])}
    predictions = [torch.randn(3, 3), torch.randn(3, 3)]
    tasks = (Twice("a", 3), Classification("b", 3))
    expected = [nn.functional.cross_entropy(p, t) for p, t in zip(predictions, batch.values(), strict=True)]
    groups = Groups(tasks)
    for found in (groups.losses(predictions, batch), groups.losses(predictions, batch, groups.units(batch))):
        torch.testing.assert_close(torch.stack(found), torch.stack([2 * expected[0], expected[1]]))
