"""What README and docs show works as shown: Python blocks run, commands compose, links lead somewhere."""

import importlib.util
import re
import shlex
import sys
import types

import pytest
import shipped
import torch
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import mtl
from mtl.certify.problem import arguments
from mtl.cli.parts import fold
from mtl.config import schema
from mtl.losses import hooks

README = ROOT / "README.md"
MANUAL = [README, ROOT / "CONTRIBUTING.md", *shipped.files("docs/*.md")]
PAGES = [*MANUAL, ROOT / "results" / "README.md", ROOT / "docs" / "methods" / "README.md"]
TEXT = {page: page.read_text() for page in PAGES}
BLOCKS = [(page, source) for page in MANUAL for source in re.findall(r"```python\n(.*?)```", TEXT[page], re.DOTALL)]
# A command, up to the end of its quotation or line, without its comment.
COMMANDS = sorted(
    {
        (page.name, re.split(r"\s{2,}|\s#", command)[0].strip())
        for page in MANUAL
        for command in re.findall(r"python (?:-m |\w+/)?[\w.]+[^`\n]*", TEXT[page].replace("\\\n", " "))
    }
)
# Mistakes shown on purpose, and options that the examples of docs/own-data.md bring along (trained below).
NOT_TRIED = ("temprature", "fp16", "train.py loss=dwa,pcgrad", "loss=mine", "my_", "…", "-sc")


def block(marker: str) -> dict:
    """Run the one Python block that contains `marker`; return its names."""
    ((page, source),) = [(page, source) for page, source in BLOCKS if marker in source]
    # As a real module: dataclasses look their module up.
    module = types.ModuleType("readme_block")
    sys.modules["readme_block"] = module
    exec(compile(source, page.name, "exec"), module.__dict__)
    return vars(module)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_python_block_runs(number, tmp_path, monkeypatch):
    page, source = BLOCKS[number]
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme_block")
    sys.modules["readme_block"] = module
    exec(compile(source, page.name, "exec"), module.__dict__)


def test_the_foreign_loop_trains_every_parameter():
    torch.manual_seed(0)
    names = block("PCGrad")
    for part in (names["backbone"], *names["heads"]):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert names["info"].weights.shape == (3,) and -1 <= names["info"].cosine <= 1


def test_the_loop_with_a_step_trains_and_learns():
    torch.manual_seed(0)
    names = block("mtl.losses.MoDo")
    learned, fresh = names["strategy"].memory(), mtl.losses.MoDo(2).memory()
    assert learned and all(not torch.equal(value, fresh[name]) for name, value in learned.items())
    assert all(p.grad is not None for p in names["parameters"]) and names["info"].weights.shape == (2,)


def test_the_number_of_methods_that_need_two_lines_only():
    """More steps than a method that depends on epochs makes in silence."""
    torch.manual_seed(0)
    backbone, heads = torch.nn.Linear(4, 6).double(), [torch.nn.Linear(6, 1).double() for _ in range(3)]
    names = [name for name in shipped.options("loss") if name != "custom"]
    enough = []
    for name in names:
        strategy = schema.build(arguments(name), "loss", tasks=["0", "1", "2"]).double()
        strategy.calls.steps = hooks.LONG
        try:
            for _ in range(33):
                features = backbone(torch.randn(8, 4, dtype=torch.float64)).tanh()
                mtl.backward([(h(features) - 1).square().mean() for h in heads], strategy, backbone, heads)
        except (RuntimeError, ValueError):
            continue
        enough.append(name)
    # A round number, so that a new method leaves README as it is.
    assert f"any of {len(names) // 10 * 10} methods" in TEXT[README] or f"any of {len(names)} methods" in TEXT[README]
    assert "**Methods:** most need no more than this" in TEXT[README] and len(enough) > len(names) / 2, enough


def test_the_strategy_is_what_its_docstring_says():
    strategy = block("class Mine")["Mine"](tasks=2)
    losses = torch.tensor([3.0, 4.0], requires_grad=True)
    total = strategy(losses)
    total.backward()
    assert total.item() == pytest.approx(5.0)
    assert losses.grad.tolist() == pytest.approx([0.6, 0.8])


def test_the_strategy_architecture_and_data_set_train_together(cli, tmp_path, monkeypatch):
    """As docs/own-data.md says, with its own YAML files, under names that no option of a user's own has."""
    sources = [
        next(source for _, source in BLOCKS if f"class {name}" in source)
        for name in ("Mine", "Tiny", "Shapes", "Table", "Masks", "MMoE")
    ]
    (tmp_path / "my_package.py").write_text("from __future__ import annotations\n" + "\n".join(sources))
    files = {"Mine": "loss/shown_mine", "Tiny": "arch/shown_tiny", "Shapes": "data/shown_shapes"}
    for text in re.findall(r"```yaml\n(.*?)```", TEXT[ROOT / "docs" / "own-data.md"], re.DOTALL):
        file = tmp_path / "my_conf" / f"{files[yaml.safe_load(text)['_target_'].partition('.')[2]]}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "my_package", None)  # the end of the test forgets the module again
    del sys.modules["my_package"]
    shown = "--config-dir my_conf data=shapes arch=tiny loss=mine trainer.epochs=1"
    assert shown in TEXT[ROOT / "docs" / "own-data.md"]
    options = [*_as_shown(shown), "logger=none"]
    run = cli(*options)
    assert run.code == 0, run.err
    assert "shape_accuracy" in run.out and "size_mae" in run.out
    for data, arch, metrics in (("Table", None, ("positive_accuracy", "total_mae")),
                                ("Table", "MMoE", ("positive_accuracy", "total_mae")),
                                ("Masks", "Dense", ("mask_accuracy", "bright_accuracy"))):  # fmt: skip
        shown = f"data=shapes arch=tiny data._target_=my_package.{data} arch._target_=my_package.{arch}"
        if arch is None:  # one of ours
            shown = f"data=shapes arch=mlp data._target_=my_package.{data}"
        assert f"--config-dir my_conf {shown}" in TEXT[ROOT / "docs" / "own-data.md"]
        run = cli("--config-dir", "my_conf", *_as_shown(shown), "trainer.epochs=1", "logger=none", "loss=pcgrad")
        assert run.code == 0, run.err
        assert all(metric in run.out for metric in metrics)
    refused = cli(*options, "loss.power=-1")
    assert refused.code == 2 and refused.err.strip() == "error: loss.power=-1: must be greater than 0"


def _as_shown(command: str) -> list[str]:
    return [re.sub(r"^(data|arch|loss)=(shapes|tiny|mine)$", r"\1=shown_\2", word) for word in command.split()]


def test_the_readme_is_short():
    assert len(TEXT[README].splitlines()) <= 150


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_no_line_is_wider_than_120_columns(page):
    assert [line for line in TEXT[page].splitlines() if len(line) > 120] == []


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_names_what_exists(page, command):
    words = command.split()
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"{page}: {command}"
    else:
        assert (ROOT / words[1]).is_file(), f"{page}: {command}"


def test_every_run_composes():
    """Each cell of a grid by its first values; plans, searches and launchers included."""
    runs = {command for _, command in COMMANDS if "train.py" in command and not any(m in command for m in NOT_TRIED)}
    assert len(runs) >= 15
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for command in sorted(runs):
            words = [w for w in shlex.split(command)[2:] if "=" in w and not w.startswith(("hydra", "++"))]
            if "-m" in command:
                words = [re.sub(r"=([^{\[,]+),.*|=(\[.*?\]),.*", r"=\1\2", word) for word in words]
            assert "_target_" in compose("config", fold(words)).data, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, f"{page.name}: {target}"


def test_what_the_results_say_of_the_verdicts_is_what_the_report_says():
    told = " ".join((ROOT / "results" / "README.md").read_text().split())
    report = (ROOT / "results" / "cifar100-reduced-study" / "report.md").read_text()
    rows = re.findall(r"\| ([\d.]+) \| ([^|]*(?:too few to tell|better|worse)) \|$", report, re.MULTILINE)
    verdicts = [verdict for _, verdict in rows]
    few, perhaps = verdicts.count("3 seeds: too few to tell"), verdicts.count("perhaps better")
    assert few + perhaps == len(rows)
    assert f'Of the {len(rows)} differences from equal weighting, the report calls {few} "3 seeds: too few' in told
    assert f'and {perhaps} "perhaps better"' in told and f"the least p is {min(p for p, _ in rows)}" in told


def test_every_page_of_the_manual_is_in_its_index():
    index = TEXT[ROOT / "docs" / "README.md"]
    assert [page.name for page in shipped.files("docs/*.md") if f"({page.name})" not in index] == ["README.md"]
