"""from_dataset: PyTorch data sets and loaders, dicts and tuples, missing labels, and what does not fit."""

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from mtl.data import Tokens, from_dataset
from mtl.errors import SetupError


class Endless(IterableDataset):
    def __iter__(self):
        i = 0
        while True:
            yield {"x": torch.tensor([i, i]), "y": i}
            i += 1


PAIRS = TensorDataset(torch.arange(10.0).view(5, 2), torch.arange(5))


def test_tuples_are_named_by_position_and_dicts_by_key():
    split = from_dataset(PAIRS, ("x", "y"))
    assert split.columns["x"].tolist() == torch.arange(10.0).view(5, 2).tolist() and split.columns["y"].tolist() == [
        *range(5)
    ]
    assert list(from_dataset(PAIRS, (None, "y"), limit=2).columns) == ["y"]
    items = [{"a": 1, "b": [2.0, 3.0]}, {"a": 4, "b": [5.0, 6.0]}]
    assert from_dataset(items).columns["b"].tolist() == [[2, 3], [5, 6]]
    chosen = from_dataset(items, {"first": "a", "second": lambda item: item["b"][1]})
    assert {name: column.tolist() for name, column in chosen.columns.items()} == {"first": [1, 4], "second": [3, 6]}
    assert from_dataset(Subset(PAIRS, [3, 1]), ("x", "y")).columns["y"].tolist() == [3, 1]


def test_pictures_arrays_bools_and_missing_labels():
    picture = Pillow.new("L", (3, 2), 7)
    items = [{"image": picture, "c": None, "n": 1.5, "b": True, "a": np.float32(1)},
             {"image": picture, "c": 2, "n": None, "b": None, "a": np.float32(2)}]  # fmt: skip
    columns = from_dataset(items).columns
    assert columns["image"].shape == (2, 2, 3, 1) and columns["image"].dtype == torch.uint8
    assert columns["c"].tolist() == [-100, 2] and columns["b"].tolist() == [1, -100] and columns["n"][1].isnan()
    assert columns["a"].dtype == torch.float32
    assert from_dataset([{"n": 3}, {"n": 2.5}]).columns["n"].tolist() == [3, 2.5]


def test_loaders_give_the_order_of_their_data_set():
    expected = from_dataset(PAIRS, ("x", "y")).columns
    for loader in (DataLoader(PAIRS, 2, shuffle=True), DataLoader(PAIRS, 2, drop_last=True), DataLoader(PAIRS, 5)):
        found = from_dataset(loader, ("x", "y")).columns
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(from_dataset(DataLoader(PAIRS, 2), ("x", "y"), limit=3)) == 3
    # A sampler that chooses samples is no shuffling.
    chosen = from_dataset(DataLoader(PAIRS, 2, sampler=SubsetRandomSampler([1, 4])), ("x", "y"))
    assert sorted(chosen.columns["y"].tolist()) == [1, 4]
    assert from_dataset(DataLoader(Endless(), 3), limit=4).columns["y"].tolist() == [0, 1, 2, 3]
    assert from_dataset(Endless(), limit=3).columns["x"].tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(("source", "columns", "said"), [
    (PAIRS, None, r"an item is a tuple of 2; name each, as in columns="),
    (PAIRS, ("x",), "a tuple of 2, and 1 names are given"), (PAIRS, "xy", "a tuple of names is needed"),
    ([{"label": 1}], {"y": "lable"}, "item 0 has no 'lable' for the column 'y', only 'label'; did you mean label"),
    ([{"a": [1]}, {"a": [1, 2]}], None, r"item 1: a has the shape \(2,\), and the items before \(1,\); pad, cut"),
    ([{"a": "word"}], None, "item 0: a is text .'word'.; turn it into numbers first"),
    ([{"a": {1}}], None, "item 0: a is a set; a number"), ([{"a": None}], None, "a is None in all items"),
    ([], None, "the list has no items"), (Endless(), None, "Endless has no length, .* give limit=SAMPLES"),
    (DataLoader(Endless(), 2), None, "give limit=SAMPLES"), ([3], None, "an item is a int; a tuple or a dict"),
])  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(source, columns, said):
    with pytest.raises(SetupError, match=said) as error:
        from_dataset(source, columns)
    assert "\n" not in str(error.value)


def test_tokens_are_integers_of_a_vocabulary():
    one = Tokens(3, 5)
    one.check(torch.tensor([[0, 1, 4]]))
    for column, said in ((torch.zeros(1, 3), "float32"), (torch.zeros(1, 2, dtype=torch.long), r"\(N, 3\)"),
                         (torch.tensor([[0, 1, 5]]), "tokens from 0 to 5; 0 to 4 are allowed")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            one.check(column)
    assert one.ready(torch.zeros(1, 3, dtype=torch.uint8)).dtype == torch.int64
    assert one.example(9, torch.Generator().manual_seed(0)).max() < 5
