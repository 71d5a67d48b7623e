"""Commands that repeat a run, whatever its config came from; a user's own code in identities and in errors."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_config import OPTIONS, REQUIRED, SNAPSHOT, composed

from mtl.cli.overrides import parse, spell, spelled, unfold
from mtl.config import identity as identities
from mtl.config import schema, source
from mtl.config.identity import identify, safe
from mtl.errors import ConfigError, Terminated

TOY = ("data=toy", "arch=point", "data.steps=2", "trainer.epochs=1", "trainer.device=cpu", "logger=none", "seed=0")
MINE = "# mine\n_target_: mtl.losses.DWA\ntemperature: 3.0\n"
PRIMARY = "defaults:\n  - config\n  - override loss: strangers\n  - _self_\ntrainer:\n  epochs: 1\n"


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The current folder, on Python's path, with config options of a user's own in conf/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loss = tmp_path / "my conf" / "loss"
    loss.mkdir(parents=True)
    (loss / "strangers.yaml").write_text(MINE)
    (tmp_path / "my conf" / "primary.yaml").write_text(PRIMARY)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def records(root: Path) -> list[tuple[Path, dict]]:
    return [(f.parent, json.loads(f.read_text())) for f in sorted(root.rglob("run.json"))]


# -------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("words", "expected"), [
    ("logger=none -m seed=0,1", "--multirun logger=none seed=0,1"),
    ("seed=0 --config-dir X loss=strangers --multirun", "--multirun --config-dir=X seed=0 loss=strangers"),
    ("seed=0 -cd X loss=strangers", "--config-dir=X seed=0 loss=strangers"),
    ("seed=0 --config-dir=X -cn p ~optimizer", "--config-name=p --config-dir=X seed=0 ~optimizer"),
    ("loss=dwa --cfg job -p loss seed=1", "--cfg=job --package=loss loss=dwa seed=1"),
    ("a=1 -i defaults b=2 --help", "--help --info=defaults a=1 b=2"),
])  # fmt: skip
def test_flags_may_stand_between_options(words, expected):
    assert spelled(parse(words.split())) == expected.split()


@pytest.mark.parametrize(("words", "said"), [
    ("loss=dwa --config-dir", "--config-dir"), ("loss=dwa --seed=0", "seed=VALUE"), ("--experimental-rerun x", "rerun"),
    ("loss=dwa --config-dir nowhere", "nowhere"), ("--config-dir a_run", "a_run/config.yaml: is no longer the whole"),
    ("--config-dir hidden --config-name config", "hides hidden/config.yaml; rename yours"),
    ("loss=dwa -cn nowhere", "nowhere"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line(cli, tmp_path, words, said):
    for folder, files in {"a_run": ["run.json", "config.yaml"], "hidden": ["config.yaml"]}.items():
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_text("{}")
    result = cli(*words.split())
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ commands that repeat


@pytest.mark.parametrize("flags", [
    ["--config-dir", "my conf", "loss=strangers"], ["hydra.searchpath=[file://{here}/my conf]", "loss=strangers"],
    ["-cd=my conf", "-cn", "primary"], ["--config-path={here}/whole", "--config-name=primary"],
], ids=["dir", "searchpath", "name", "path"])  # fmt: skip
def test_the_printed_command_repeats_the_run(cli, own, flags):
    if "whole" in flags[0]:  # a config tree of a user's own
        shutil.copytree(ROOT / "conf", own / "whole")
        shutil.copytree(own / "my conf", own / "whole", dirs_exist_ok=True)
    first = cli(*TOY, *(flag.format(here=own) for flag in flags))
    assert first.code == 0, first.err
    ((directory, run),) = records(own)
    assert run["loss"] == "strangers"
    printed = re.search(r"^reproduce: (.*)$", first.out, re.M)[1]
    assert printed == run["command"]
    again = cli(*shlex.split(printed)[2:])
    assert again.code == 0 and f"in {directory.relative_to(own)} (delete" in again.out, again.err


def test_cells_and_baselines_keep_the_flags(cli, own):
    result = cli("-m", *TOY, "--config-dir=my conf", "loss=strangers", "study.baselines=auto")
    assert result.code == 0, result.err
    (cells,) = (own / "outputs" / "multirun").iterdir()
    commands = [run["command"] for _, run in records(own)]
    commands += [json.loads(file.read_text())["command"] for file in cells.glob("cell-*.json")]
    assert len(commands) == 6 and all("'--config-dir=my conf'" in command for command in commands)


@pytest.mark.parametrize("name", ["dwa", "strangers", "same"])
def test_an_option_that_ours_would_hide_is_refused(cli, own, name):
    """Chosen itself, or as the base of a chosen one; an unchanged copy of ours hides nothing."""
    text = (ROOT / "conf" / "loss" / "dwa.yaml").read_text()
    (own / "my conf" / "loss" / "dwa.yaml").write_text(text if name == "same" else text.replace("2.0", "3.0"))
    if name == "strangers":
        (own / "my conf" / "loss" / "strangers.yaml").write_text("defaults: [dwa]\ntemperature: 1.0\n")
    result = cli(*TOY, "--config-dir=my conf", f"loss={name.replace('same', 'dwa')}")
    assert result.code == (0 if name == "same" else 2), result.err
    if name != "same":
        (line,) = result.err.splitlines()
        assert re.search(r"loss=dwa: \S*conf/loss/dwa.yaml hides my conf/loss/dwa.yaml, .*; rename yours", line)
        assert cli(*TOY, "--config-dir=my conf", "loss=equal").code == 0


SAVED = [
    ["loss=dwa", "loss.temperature=1.5"],
    ["loss=static", "loss.weights={L1: 2, L2: 0.5}", "data=digits", "output_root=a b", "seed=3"],
    ["loss=custom", "loss.file='odd name,.py'", "loss.args={a: null, b: [x, '1']}"],
    ["optimizer._target_=torch.optim.RMSprop", "~optimizer.nesterov", "~optimizer.fused", "+optimizer.alpha=0.9"],
    ["loss=annealed_boosted", "step.gradients=features", "schedule=multistep", "schedule.milestones=[1,3]"],
    ["experiment=quickstart", "logger.tags=[a,'b c']", "study.baselines=auto"],
    ["arch._target_=mod.Net", "+arch.inner={_target_: mod.Part, size: 1e-5}"],
]


@pytest.mark.parametrize(("words", "alone"), [
    *((words, False) for words in SAVED), *((words, True) for words in SAVED[1:5:2])
])  # fmt: skip
def test_a_saved_config_is_the_same_run(own, words, alone):
    """With run.json beside it, and as a file that was copied elsewhere."""
    write(own)
    (own / "odd name,.py").write_text(FILES["loss.py"])
    config, choices = composed(*words)
    (own / "saved").mkdir()
    (own / "saved" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if not alone:
        run = {"choices": choices, "command": shlex.join(["python", "train.py", *words])}
        (own / "saved" / "run.json").write_text(json.dumps(run))
    arguments = unfold(parse(["--config-dir=saved", "--config-name", "config", "trainer.device=cpu"]))
    assert (arguments.config_dir, arguments.config_path, arguments.config_name) == (None, None, None)
    again, chosen = composed(*arguments.overrides)
    assert again == {**config, "trainer": {**config["trainer"], "device": "cpu"}}
    assert identify(again, chosen) == identify(config, choices)


def test_what_a_run_filled_in_for_auto_is_auto_again(own):
    """Single-task results differ from seed to seed; the run is identified by the word, as typed."""
    config, choices = composed("loss=amtl")
    filled = {**config, "loss": {**config["loss"], "potentials": {"fine": 0.5, "coarse": 0.7}}}
    (own / "config.yaml").write_text(yaml.safe_dump(filled))
    for typed, expected in ("loss=amtl", config), ("loss=amtl loss.potentials='{fine: 0.5, coarse: 0.7}'", filled):
        (own / "run.json").write_text(json.dumps({"choices": choices, "command": f"python train.py {typed}"}))
        assert composed(*unfold(parse(["--config-dir=."])).overrides)[0] == expected


def test_options_on_a_saved_config_count(own):
    config, choices = composed("loss=dwa", "loss.temperature=1.5", "seed=3")
    (own / "config.yaml").write_text(yaml.safe_dump(config))
    (own / "run.json").write_text(json.dumps({"choices": choices, "command": "python train.py"}))
    arguments = unfold(parse(["seed=0,1", "-m", "loss=equal,pcgrad", "--config-dir=.", "-cn=config"]))
    assert arguments.multirun and [w for w in arguments.overrides if w.startswith(("loss", "seed"))] == [
        "seed=0,1", "loss=equal,pcgrad"
    ]  # fmt: skip


def test_a_saved_run_is_run_again_from_its_folder(cli, own):
    assert cli(*TOY, "--config-dir=my conf", "loss=strangers", "loss.temperature=1.5").code == 0
    ((directory, run),) = records(own)
    for flags in (["--config-dir", str(directory), "--config-name", "config"], ["-cp", str(directory)]):
        assert f"{run['name']}: finished" in cli(*flags).out
    other = cli("-m", "seed=0,7", "-cd", str(directory), "study.plan=true")
    assert re.findall(r"-strangers-s(\d)-\w+ +(\w+)", other.out) == [("0", "finished"), ("7", "new")]


VALUES = [
    1, 1e-5, 1e30, True, None, "auto", "null", "1", "a b", "it's", "a,b", "C:\\x\\", "", "{x}", "~a", "x=y", "a:b",
    "$x", [1, "b c"], {"fine": 2.0, "x": [None, "1"]},
]  # fmt: skip


def test_a_value_is_spelled_as_hydra_reads_it():
    config, _ = composed(*(f"++data.v{i}={spell(value)}" for i, value in enumerate(VALUES)))
    read = [config["data"][f"v{i}"] for i in range(len(VALUES))]
    assert read == VALUES and list(map(type, read)) == list(map(type, VALUES))


# -------------------------------------------------------------------------------------------------------- identity


SINGLE = {" ".join([f"{group}={option}", *REQUIRED.get(option, ())]) for group, option in OPTIONS}


@pytest.mark.parametrize("words", [words for words in SNAPSHOT if words not in SINGLE])
def test_names_and_digests_are_those_of_the_snapshot(words, monkeypatch):
    """The single options of groups are compared in test_config.py, which composes them anyway."""
    monkeypatch.delenv("MTL_DATA", raising=False)
    run = identify(*composed(*(re.split(r" (?![^{]*})", words) if words else [])))
    assert f"{run.group} {run.name}" == SNAPSHOT[words]


def test_options_added_later_and_classes_moved_later_change_no_identity(monkeypatch):
    config, choices = composed("loss=dwa")
    before = identify(config, choices)
    later = {**config, "trainer": {**config["trainer"], "stages": []}, "sharing": {"_target_": "mtl.archs.HardSharing"}}
    later["loss"] = {**config["loss"], "_target_": "mtl.losses.moved.DWA", "slope": 1.0}
    assert identify(later, choices).digest != before.digest
    added = {"trainer.stages": [], "sharing": {"_target_": "mtl.archs.HardSharing"}, "loss.slope@mtl.losses.DWA": 1.0}
    monkeypatch.setattr(identities, "ADDED", identities.ADDED | added)
    monkeypatch.setattr(identities, "MOVED", identities.MOVED | {"mtl.losses.moved.DWA": "mtl.losses.DWA"})
    assert identify(later, choices).digest == before.digest
    later["trainer"]["stages"] = [1]
    assert identify(later, choices).digest != before.digest
    later["trainer"]["stages"], later["loss"]["_target_"] = [], "mtl.losses.Other"
    assert identify(later, choices).digest != before.digest


def test_a_class_of_ours_has_moved_since(own, monkeypatch):
    """A saved config describes the same run as before; the old name in a command is answered by the new one."""
    config, choices = composed("loss=dwa")
    monkeypatch.setattr(identities, "MOVED", identities.MOVED | {"mtl.losses.DWA": "mtl.losses.elsewhere.DWA"})
    saved = {**config, "loss": {**config["loss"], "_target_": "mtl.losses.elsewhere.DWA"}}
    (own / "saved").mkdir()
    (own / "saved" / "config.yaml").write_text(yaml.safe_dump(saved))
    again, chosen = composed(*unfold(parse(["--config-dir=saved", "--config-name=config"])).overrides)
    assert again == config and identify(again, chosen) == identify(config, choices) == identify(saved, choices)
    with pytest.raises(ConfigError, match=r"loss\._target_=mtl\.losses\.elsewhere\.DWA: is mtl\.losses\.DWA now"):
        schema.locate("mtl.losses.elsewhere.DWA", "loss._target_")
    for name in ([], {}, ["a"], 1):
        with pytest.raises(ConfigError, match=r"loss\._target_="):
            schema.locate(name, "loss._target_")


FILES = {  # a module, and what it consists of
    "mod.py": "import torch\nimport numpy as np\nfrom helper import f\nclass Loss: ...\nclass Data: ...\n",
    "helper.py": "import deep.inner\ndef f(): return 1\n",
    "deep/__init__.py": "",
    "deep/inner.py": "from .sibling import g\nfrom . import sibling\n",
    "deep/sibling.py": "def g(): return 1\n",
    "unused.py": "",
    "loss.py": "import math\nimport helper\n",
}


def write(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    importlib.invalidate_caches()
    return folder


@pytest.mark.parametrize("node", ["loss", "file", "data", "arch", "optimizer", "nested"])
def test_a_changed_line_in_own_code_is_another_run(own, node):
    write(own)
    config, choices = composed("loss=custom", f"loss.file={own}/loss.py") if node == "file" else composed()
    if node == "nested":
        config["loss"]["parts"] = [{"inner": {"_target_": "mod.Loss"}}]
    elif node != "file":
        config[node]["_target_"] = "mod.Loss"
    before = identify(config, choices)
    assert identify(config, choices) == before and not {"mod", "helper", "deep"} & set(sys.modules)
    parts = [
        "helper.py",
        "deep/inner.py",
        "deep/sibling.py",
        "deep/__init__.py",
        "loss.py" if node == "file" else "mod.py",
    ]
    for name in parts:
        text = (own / name).read_text()
        (own / name).write_text(f"{text}# changed\n")
        assert identify(config, choices).digest != before.digest, name
        (own / name).write_text(text)
    (own / "unused.py").write_text("x = 1\n")
    assert identify(config, choices) == before


def test_own_code_is_its_content_not_its_folder(tmp_path, monkeypatch):
    found = []
    for name in ("a", "b"):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(write(tmp_path / name))
            config, choices = composed("loss=custom", f"loss.file={tmp_path}/{name}/loss.py")
            config["arch"]["_target_"] = "mod.Loss"
            found.append(identify(config, choices))
    assert found[0] == found[1]


def test_what_does_not_decide_the_numbers_stays_out_though_it_is_own_code(own):
    write(own)
    config, choices = composed()
    before = identify(config, choices)
    config["logger"] = {"_target_": "mod.Loss"}
    assert identify(config, choices) == before


def test_the_folder_of_own_data_decides_the_numbers(own):
    write(own)
    config, choices = composed("data.root=a")
    config["data"]["_target_"] = "mod.Data"

    def digest(**changed):
        return identify({**config, "data": {**config["data"], **changed}}, choices).digest

    assert digest() == digest(root="./a/") == digest(root=str(own / "a")) == digest(workers=0, residency="host")
    assert digest() != digest(root="b")


def test_code_that_changes_while_a_command_runs_is_refused(cli, own):
    """The process still has the old code: its numbers must not get the new code's name."""
    (own / "strangers.py").write_text("from mtl.losses import DWA\nclass Mine(DWA): ...\n")
    importlib.invalidate_caches()
    assert cli(*TOY, "loss=dwa", "loss._target_=strangers.Mine").code == 0
    (own / "strangers.py").write_text("from mtl.losses import DWA\nclass Mine(DWA): x = 1\n")
    result = cli(*TOY, "loss=dwa", "loss._target_=strangers.Mine")
    assert result.code == 2 and result.err.startswith("error: strangers was changed while this command ran")
    del sys.modules["strangers"]  # as in a process of its own
    importlib.invalidate_caches()
    assert cli(*TOY, "loss=dwa", "loss._target_=strangers.Mine").code == 0
    assert len(records(own)) == 2


# ------------------------------------------------------------------------------------------------------------ names

LABELS = [
    "a" * 40,
    "a" * 300,
    "a:b",
    "a#b",
    "a/b",
    "a b",
    "../..",
    ".",
    "..",
    "",
    "-x",
    "ä" * 50,
    "a\nb",
    "a?b%c",
    "\udcff",
]


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_a_label_that_no_folder_or_dashboard_takes_is_mended(label):
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,38}", safe(label))
    assert safe(safe(label)) == safe(label) != safe(f"{label}x")
    run = identities.Identity(safe(label), safe(label), safe(label), "1a2b3c4d", 2**63 - 1)
    assert max(len(run.name), len(run.group)) <= 128 and len(run.loss) <= 64


@pytest.mark.parametrize("label", ["resnet20", "custom-my_loss", "annealed_uncertainty", "v1.2+x", "a" * 39])
def test_an_ordinary_label_stays(label):
    assert safe(label) == label


def test_odd_names_of_options_files_and_classes_become_safe(own):
    (own / f"{'long' * 20}: #1.py").write_text(FILES["loss.py"])
    config, choices = composed("loss=custom", f"loss.file='{own}/{'long' * 20}: #1.py'")
    run = identify(config, {**choices, "arch": "sub/net", "data": "a b"})
    assert run.loss.startswith("custom-longlong") and run.arch.startswith("sub_net-") and run.data.startswith("a_b-")
    assert len(run.directory("o").parts) == 6


# ----------------------------------------------------------------------------------------------- errors in own code

BROKEN = {  # file: its text, what the line says beside file and line
    "call": (
        "def Mine(tasks):\n    return len(None)\n",
        "strangers.py:2 in Mine",
        "object of type 'NoneType' has no len()",
    ),
    "torch": ("import torch\ndef Mine(tasks):\n    torch.ones(2) @ torch.ones(3)\n", "strangers.py:3 in Mine", "size"),
    "key": ("def Mine(tasks):\n    return {}['weight']\n", "strangers.py:2 in Mine", "KeyError: 'weight'"),
    "zero": ("def Mine(tasks):\n    return 1 / 0\n", "strangers.py:2 in Mine", "ZeroDivisionError"),
    "import": ("x = 1\nimport nowhere_at_all\n", "strangers.py:2 in <module>", "nowhere_at_all"),
    "syntax": ("def Mine(tasks:\n    pass\n", "strangers.py:1", "loss._target_=strangers.Mine"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_error_in_own_code_names_its_file_and_line(cli, own, kind):
    text, *said = BROKEN[kind]
    (own / "strangers.py").write_text(text)
    importlib.invalidate_caches()
    result = cli(*TOY, "loss._target_=strangers.Mine")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and result.err.startswith("error: loss")
    assert [part for part in said if part not in result.err] == [], result.err
    file = Path(re.search(r"; traceback in (\S+)\)$", result.err.strip())[1])
    assert file.is_relative_to(own / "cache") and "Traceback (most recent call last)" in file.read_text()
    assert not (own / "outputs").exists()


def test_an_own_net_that_does_not_fit_names_its_line(cli, own):
    (own / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    out_features = 3\n    def __init__(self, in_channels):\n"
        "        super().__init__()\n        self.fc = nn.Linear(5, 3)\n    def forward(self, x):\n"
        "        return self.fc(x.flatten(1))\n"
    )
    importlib.invalidate_caches()
    result = cli("data=digits", "logger=none", "arch._target_=net.Net", "~arch.depth")
    assert result.code == 2 and len(result.err.splitlines()) == 1, result.err
    assert "does not fit the inputs of data (1x8x8)" in result.err and "net.py:8 in forward; traceback in" in result.err


def test_an_error_in_own_data_names_its_line(cli, own):
    (own / "mydata.py").write_text(
        "from dataclasses import dataclass\nfrom mtl.data.digits import Digits\n@dataclass\nclass Mine(Digits):\n"
        "    def load(self):\n        return [][0]\n"
    )
    importlib.invalidate_caches()
    result = cli("data=digits", "logger=none", "data._target_=mydata.Mine")
    assert result.code == 1 and len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith(
        "error: data: Mine.load(): IndexError: list index out of range (mydata.py:6 in load; traceback in"
    )


def test_a_message_that_own_code_raises_on_purpose_is_the_line_alone(cli, own):
    (own / "mydata.py").write_text(
        "from dataclasses import dataclass\nfrom mtl.errors import SetupError\n"
        "from mtl.data.digits import Digits\n@dataclass\nclass Mine(Digits):\n"
        "    def load(self):\n        raise SetupError('data.root: no images there')\n"
    )
    importlib.invalidate_caches()
    result = cli("data=digits", "logger=none", "data._target_=mydata.Mine")
    assert (result.code, result.err) == (1, "error: data.root: no images there\n")


@pytest.mark.parametrize(("text", "place"), [
    ("x = 1\nx.y\n", "loss.py:2 in <module>"), ("import (\n", "loss.py:1"),
    ("from torch import nn\nclass MultiTaskLoss(nn.Module):\n    def __init__(self):\n        self.a['b']\n",
     "loss.py:4 in __init__"),
])  # fmt: skip
def test_an_error_in_an_own_loss_file_names_its_line(cli, own, text, place):
    (own / "loss.py").write_text(text)
    result = cli(*TOY, "loss=custom", "loss.file=loss.py")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and f"({place}; traceback in" in result.err


def test_an_error_of_our_own_checks_is_the_line_alone():
    for words in (["loss=static", "loss.weights=[1]"], ["optimizer=sgd", "optimizer.lr=-1"]):
        config, _ = composed(*words)
        group, supplied = words[0].split("=")[0], {"loss": {"tasks": ["a", "b"]}, "optimizer": {"params": []}}
        with pytest.raises(ConfigError) as caught:
            schema.build(config[group], group, **supplied[group])
        assert "traceback" not in str(caught.value) and ".py" not in str(caught.value)


def test_own_is_what_is_neither_ours_nor_installed(tmp_path):
    (tmp_path / "x.py").touch()
    assert source.is_own(tmp_path / "x.py")
    assert not any(map(source.is_own, [schema.__file__, pytest.__file__, json.__file__, ROOT / "train.py", "<string>"]))


# ------------------------------------------------------------------------------------------------------------ fuzz

NONSENSE = [  # accepted, or a traceback, before
    ("loss=uncertainty_sigma loss.sigma=1" + "0" * 30, "loss.sigma"),
    ("data=toy data.batch_size=1" + "0" * 30, "data.batch_size"),
    ("data.workers=1" + "0" * 30, "data.workers"),
    ("optimizer.lr=1e308", "optimizer.lr"),
    (f"trainer.precision={'x' * 5000}", "trainer.precision=xxxx"),
    (f"loss._target_={'x' * 5000}", "loss._target_=xxxx"),
    ("optimizer.momentum=2", "optimizer.momentum=2: must be less than 1"),
    ("optimizer=adamw optimizer.weight_decay=1e30", "optimizer.weight_decay"),
    ("seed=1" + "0" * 25, "seed"),
    ("data=synthetic loss=static 'loss.weights={fine: 0, coarse: 0}'", "loss.weights"),
    ("data=synthetic loss=static 'loss.weights={}'", "loss.weights"),
    ("data=synthetic loss=auto_lambda loss.primary=[]", "loss.primary"),
]


@pytest.mark.parametrize(("line", "said"), NONSENSE)
def test_nonsense_is_refused_in_one_line(cli, own, monkeypatch, line, said):
    result = cli("logger=none", "trainer.epochs=1", *shlex.split(line))
    assert result.code == 2 and len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith(f"error: {said}") and len(result.err) < 300


def test_data_that_no_memory_holds_are_one_line(cli, own, monkeypatch):
    def load(self):
        raise MemoryError("cannot allocate 10 TB")

    monkeypatch.setattr("mtl.data.digits.Digits.load", load)
    result = cli("data=digits", "logger=none")
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert result.err.startswith("error: not enough memory: cannot allocate 10 TB")


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_before_the_first_epoch_leaves_nothing(cli, own, monkeypatch, number):
    def stop(config):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("mtl.cli.cell.run_from_hydra", stop)
    result = cli("-m", *TOY)
    assert (result.code, result.out, result.err) == (128 + number, "", "")
    assert not (own / "outputs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_after_the_last_run_is_no_traceback(tmp_path, number):
    program = (
        f"import atexit, os, sys\nfrom mtl.cli.command import script\nsys.argv[1:] = []\n"
        f"script(lambda: atexit.register(os.kill, os.getpid(), {int(number)}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True)
    assert (result.returncode, result.stderr) == (128 + number, b"")


def test_of_a_burst_of_signals_the_first_counts(cli, own, monkeypatch):
    noted = []

    def run(config):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), number)
            noted.append("interrupted")

    monkeypatch.setattr("mtl.cli.cell.run_from_hydra", run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli(*TOY).code == 143 and noted == ["interrupted"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_terminated_knows_its_exit_code():
    assert Terminated().code == 143
