"""What the README shows works as shown: its Python blocks run, its classes train, its options exist."""

import re
import sys
import types

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(marker: str) -> dict:
    """Run the one Python block that contains `marker`; return its names."""
    (source,) = [b for b in BLOCKS if marker in b]
    # As a real module: dataclasses look their module up.
    module = types.ModuleType("readme_block")
    sys.modules["readme_block"] = module
    exec(compile(source, "README.md", "exec"), module.__dict__)
    return vars(module)


def test_the_foreign_loop_trains_every_parameter():
    torch.manual_seed(0)
    names = block("mtl.backward")
    for part in (names["backbone"], *names["heads"]):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert names["info"].weights.shape == (3,) and -1 <= names["info"].cosine <= 1


def test_the_strategy_is_what_its_docstring_says():
    strategy = block("class Mine")["Mine"](tasks=2)
    losses = torch.tensor([3.0, 4.0], requires_grad=True)
    total = strategy(losses)
    total.backward()
    assert total.item() == pytest.approx(5.0)
    assert losses.grad.tolist() == pytest.approx([0.6, 0.8])


def test_the_strategy_architecture_and_data_set_train_together(cli, tmp_path, monkeypatch):
    sources = [next(b for b in BLOCKS if f"class {name}" in b) for name in ("Mine", "Tiny", "Shapes")]
    (tmp_path / "my_package.py").write_text("from __future__ import annotations\n" + "\n".join(sources))
    monkeypatch.syspath_prepend(tmp_path)
    # data=digits and arch=vgg16_bn lend their common keys; ~ removes what the new class does not take.
    options = ["data=digits", "data._target_=my_package.Shapes", "arch=vgg16_bn", "~arch.dropout", "logger=none",
               "arch._target_=my_package.Tiny", "loss._target_=my_package.Mine", "trainer.epochs=1"]  # fmt: skip
    run = cli(*options)
    assert run.code == 0, run.err
    assert "shape_accuracy" in run.out and "size_mae" in run.out
    refused = cli(*options, "+loss.power=-1")
    assert refused.code == 2 and refused.err.strip() == "error: loss.power=-1: must be greater than 0"


def test_the_methods_table_is_complete():
    rows = set(
        re.findall(r"^\| `(\w+)` \|", README.partition("## Methods")[2].partition("## Protocol")[0], re.MULTILINE)
    )
    assert rows == {f.stem for f in (ROOT / "conf" / "loss").glob("*.yaml")}


def test_every_shown_command_composes():
    """Single runs; grids, other flags and the deliberate mistakes are left to their own tests."""
    commands = [re.split(r"\s{2,}", c)[0] for c in re.findall(r"python train\.py ([^`\n#]+)", README)]
    mistakes = ("temprature", "fp16", "loss=dwa,pcgrad", "loss=mine")
    single = [c.split() for c in commands if " -" not in f" {c}" and not any(m in c for m in mistakes)]
    assert len(single) >= 2
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for words in single:
            assert "_target_" in compose("config", words).data
