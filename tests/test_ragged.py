"""Ragged columns: samples with different numbers of rows, as inputs and as labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mtl.archs.check import check_model
from mtl.archs.model import HardSharing, count_macs
from mtl.data import Benchmark, Numbers, Ragged, Rows, Split
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.data.check import check_loaded, few
from mtl.data.columns import equal
from mtl.errors import SetupError
from mtl.metrics.base import Mean, Score
from mtl.tasks import Regression, Task

SAMPLES = [[1.0, 2.0, 3.0], [], None, [4.0], [5.0, 6.0], None, [], [7.0, 8.0, 9.0, 10.0]]
LENGTHS = [-1 if sample is None else len(sample) for sample in SAMPLES]


def ragged(samples: Sequence) -> Ragged:
    return Ragged.of([None if s is None else torch.tensor(s) for s in samples])


def lists(column: Ragged) -> list:
    """The samples as Python lists, read with no function of `Ragged`."""
    found, values = [], column.values.tolist()
    for length in column.lengths.tolist():
        found.append(None if length < 0 else values[: max(length, 0)])
        values = values[max(length, 0) :]
    assert values == []
    return found


@pytest.mark.parametrize(
    "index",
    [slice(None), slice(2, 5), slice(3, 3), slice(5, 2), slice(-3, None), slice(0, 100), slice(1, 7, 2), slice(2),
     slice(None, None, 3), [7, 0, 2, 2], [], [-1, 1], [True, False] * 4],
)  # fmt: skip
def test_samples_are_selected_as_a_list_selects_them(index):
    column = ragged(SAMPLES)
    if isinstance(index, slice):
        wanted, found = SAMPLES[index], column[index]
    else:
        mask = bool(index) and isinstance(index[0], bool)
        wanted = [s for s, keep in zip(SAMPLES, index, strict=True) if keep] if mask else [SAMPLES[i] for i in index]
        found = column[torch.tensor(index, dtype=torch.bool if mask else torch.int64)]
    assert lists(found) == wanted
    again = found[torch.arange(len(found)).flip(0)]  # a selection of a selection
    assert lists(again) == wanted[::-1]
    assert found.owner().tolist() == [i for i, s in enumerate(wanted) for _ in s or []]
    assert found.within().tolist() == [j for s in wanted for j in range(len(s or []))]
    width = max([len(s or []) for s in wanted], default=0)
    padded = [[*(s or []), *[-9.0] * (width - len(s or []))] for s in wanted]
    assert found.padded(fill=-9.0).tolist() == padded
    assert found.padded(width + 1, -9.0).tolist() == [[*row, -9.0] for row in padded]


def test_one_sample_is_a_tensor_and_a_slice_is_no_copy():
    column = ragged(SAMPLES)
    assert column[0].tolist() == SAMPLES[0] and column[-1].tolist() == SAMPLES[-1] and column[2].tolist() == []
    assert column[3:6].values.data_ptr() == column.values[3:].data_ptr()
    with pytest.raises(IndexError):
        column[8]
    with pytest.raises(ValueError, match="a sample has 4 rows, more than 3"):
        column.padded(3)


def test_a_split_selects_ragged_columns_with_the_others():
    split = Split({"number": torch.arange(8), "atoms": ragged(SAMPLES)})
    assert split.bytes == 8 * 8 + 10 * 4 + 8 * 8
    chosen = split.select(torch.tensor([4, 2, 7, 1])).select(slice(1, 3))
    assert chosen.columns["atoms"] is split.columns["atoms"]  # nothing was copied
    assert chosen.bytes == 2 * 8 + 4 * 4 + 2 * 8
    assert lists(chosen.column("atoms")) == [SAMPLES[2], SAMPLES[7]]
    batch = chosen.batch(torch.tensor([1]))
    assert batch["number"].tolist() == [7] and lists(batch["atoms"]) == [SAMPLES[7]]
    assert chosen.to(torch.device("cpu")) is chosen


class Off(Mean):
    scores = (Score("off", higher_is_better=False),)

    def add(self, prediction, target):
        error = (prediction[:, 0] - target.lengths).abs()
        return error[target.lengths >= 0].sum(), (target.lengths >= 0).sum()


@dataclass(frozen=True)
class Count(Task):
    """The number of rows of a ragged label; an empty sample is labelled."""

    metrics = (Off(),)
    allowed = "a mark must be finite"

    def units(self, target):
        return (target.lengths >= 0).long()

    def criterion(self, prediction, target):
        return torch.where(target.lengths >= 0, (prediction[:, 0] - target.lengths).square(), 0.0)

    def wrong(self, target):
        return ~target.values.isfinite()


class Cloud(nn.Module):
    """The sum over a sample's points of a function of point and colour."""

    inputs, out_features = ("points", "colours"), 6

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(4, 6), nn.Linear(3, 6)

    def forward(self, points, colours):
        rows = torch.tanh(self.layer(points.values) + self.embed(colours.values))
        return rows.new_zeros(len(points), 6).index_add(0, points.owner(), rows)


@dataclass
class Clouds(Benchmark):
    batch_size: int = 7
    eval_batch_size: int = 10
    size: int = 40

    tasks = (Count("marks"), Regression("total"))
    inputs = {"points": Rows((3,)), "colours": Rows(below=4)}

    def load(self):
        draws = torch.Generator().manual_seed(0)

        def split(size):
            lengths = torch.randint(0, 5, (size,), generator=draws)
            points = torch.randn(int(lengths.sum()), 3, generator=draws, dtype=torch.float64)
            colours = torch.randint(4, (len(points),), generator=draws, dtype=torch.uint8)
            marks = [None if i % 3 == 0 else torch.ones(i % 4) for i in range(size)]
            total = Ragged(points, lengths).padded()[..., 0].sum(1)
            columns = {"points": Ragged(points, lengths), "colours": Ragged(colours, lengths)}
            return Split({**columns, "marks": Ragged.of(marks), "total": total})

        return {"train": split(self.size), "test": split(23)}


@pytest.mark.parametrize("options", [{}, {"limit_train": 30, "val_fraction": 0.2}])
def test_all_residencies_give_the_same_batches_of_the_right_samples(options):
    epochs = []
    for residency, workers in [("device", 0), ("host", 0), ("host", 2)]:
        benchmark = Clouds(residency=residency, workers=workers, **options)
        splits = benchmark.splits()
        train = TrainingBatches(splits["train"], benchmark, torch.device("cpu"), seed=3)
        assert train.partial == {"marks"}
        tests = EvaluationBatches(splits["test"], benchmark, torch.device("cpu"))
        epochs.append([*train.epoch(1), *tests])
        for batch in epochs[-1]:
            points = batch["points"]
            assert points.dtype == torch.float32 and batch["colours"].dtype == torch.int64
            sums = torch.stack([points[i][:, 0].sum() for i in range(len(points))])
            torch.testing.assert_close(sums, batch["total"].float())
    for other in epochs[1:]:
        assert len(other) == len(epochs[0])
        for a, b in zip(epochs[0], other, strict=True):
            assert all(equal(a[name], b[name]) for name in a)


def test_a_network_on_ragged_inputs_is_checked_and_counted():
    benchmark = Clouds()
    model = HardSharing(Cloud(), benchmark.tasks)
    outputs = check_model(model, benchmark.example(2, torch.Generator()), ["marks", "total"])
    assert outputs.features.shape == (2, 6)
    assert count_macs(model, benchmark.one()) == 3 * 3 * 6 + 2 * 6  # three points, and two heads


def test_the_batch_that_tries_the_tasks_has_an_unlabelled_sample():
    benchmark = Clouds()
    split = benchmark.splits()["train"].select(slice(1, None))
    assert few(split, benchmark.tasks)["marks"].lengths.tolist() == [1, 2, -1]


WRONG = [
    ("points", lambda c: c.values, "points: a Tensor; a ragged column is needed: mtl.data.Ragged"),
    ("points", lambda c: Ragged(c.values[1:], c.lengths), "points: the lengths add up to 93, but there are 92 rows"),
    ("points", lambda c: Ragged(c.values[:, :2], c.lengths), r"float64 of shape \(93, 2\); floats of shape \(M, 3\)"),
    ("points", lambda c: Ragged(c.values, c.lengths.int()), "lengths are torch.int32"),
    ("points", lambda c: c[:5], "colours: 40 rows, and 5 of points"),
    ("colours", lambda c: Ragged(c.values + 2, c.lengths), "colours: a row holds 5; integers from 0 to 3 are needed"),
    ("colours", lambda c: Ragged(c.values.float(), c.lengths), r"integers of shape \(M,\) are needed"),
    ("points", lambda c: Ragged(torch.cat([c.values[:9]]), torch.tensor([9, -1])), "sample 1 has the length -1"),
    ("marks", lambda c: c[:5], "labels of task 'marks': 5 lengths; one for each of the 40 samples"),
    ("marks", lambda c: Ragged(c.values, c.lengths - 1), "labels of task 'marks': a sample has the length -2"),
    ("marks", lambda c: Ragged(c.values / (torch.arange(len(c.values)) != 3), c.lengths),
     "labels of task 'marks': sample 5 has the label inf; a mark must be finite"),
    ("total", lambda c: ragged(SAMPLES), "labels of task 'total': 8 lengths; one for each"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG)
def test_wrong_ragged_columns_are_refused_in_one_line(name, spoil, message):
    benchmark = Clouds()
    loaded = benchmark.load()
    loaded["train"].columns[name] = spoil(loaded["train"].columns[name])
    with pytest.raises(SetupError, match=message) as raised:
        check_loaded(benchmark, loaded)
    assert "\n" not in str(raised.value)


def test_a_ragged_column_for_a_tensor_input_is_refused():
    class Table(Clouds):
        inputs = {"points": Numbers((3,))}

    with pytest.raises(SetupError, match="points: a Ragged; a tensor is needed"):
        check_loaded(Table(), Clouds().load())
