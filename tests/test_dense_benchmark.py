"""benchmarks/dense.py still runs, and its ways compute the same. What it measures is not tested."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import dense


@pytest.fixture
def options():
    words = "--height 16 --width 16 --arch-width 2 --batch 2 --steps 1 --rounds 1 --device cpu"
    return dense.parse(words.split())


def test_all_ways_compute_the_same_first_step_and_have_a_row(options):
    keys = dense.chosen(options)
    assert dense.check(keys, options) == {}
    data = dense.Data(options, options.steps)
    seconds = dense.times({key: dense.build(key, options, data) for key in keys}, options)
    found = dense.rows(keys, seconds, {"epoch": dense.memory("epoch", options)}, {})
    assert [row["key"] for row in found] == keys
    assert all(row["step_ms"] > 0 and row["x"]["median"] > 0 for row in found)


def test_a_way_that_computes_something_else_is_not_measured(options, monkeypatch):
    by_hand = dense.by_hand
    monkeypatch.setattr(dense, "by_hand", lambda *given: [1.001 * loss for loss in by_hand(*given)])
    with pytest.raises(SystemExit, match=r"^step: losses \[.*plain loop's"):
        dense.check(["plain", "step"], options)
