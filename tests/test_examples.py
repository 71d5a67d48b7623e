"""docs/examples: each runs, and learns. Lightning and transformers are no dependencies: two are skipped without."""

import importlib
import sys

import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "docs" / "examples"
NEEDS = {"lightning_loop": ("lightning",), "huggingface_trainer": ("transformers", "accelerate")}


@pytest.fixture
def example(monkeypatch, tmp_path):
    """`example("tabular")` imports an example, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str):
        for package in NEEDS.get(name, ()):
            pytest.importorskip(package, reason=f"{package} is not installed, and no dependency")
        return importlib.import_module(name)

    yield load
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_text(example):
    last = example("text_lstm").main().summary["last"]
    assert last["test/topic_accuracy"] > 90 and last["test/positive_accuracy"] > 90


def test_a_table(example):
    result, answers = example("tabular").main()
    assert answers["income"]["number"].tolist() == pytest.approx([900 + 600 + 1200, 900 + 1200 + 2700], rel=0.1)
    assert answers["content"]["class"].tolist() == [1, 0] and result.summary["last"]["test/income_mae"] < 200


@pytest.mark.parametrize("name", NEEDS)
def test_loops_of_other_libraries(example, name):
    seen = example(name).main().seen
    assert len(seen) == 64 and torch.stack(seen[-8:]).mean(0).lt(0.5 * seen[0]).all()


def test_every_example_is_in_the_manual_and_is_run_here():
    manual = (ROOT / "docs" / "own-data.md").read_text() + (ROOT / "docs" / "python.md").read_text()
    names = {file.stem for file in FOLDER.glob("*.py")} - {"problem"}
    assert names == {"text_lstm", "tabular", *NEEDS}
    assert not [name for name in names if f"examples/{name}.py" not in manual]
