"""Configs and command line: every YAML holds, every mistake is one line, a run's name is what decides its numbers."""

import inspect
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import shipped
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from mtl.cli.command import CONF
from mtl.cli.parts import fold, with_parts
from mtl.config.identity import identify
from mtl.config.schema import TARGET, build, locate
from mtl.engine.build import NODES, check

ROOT = CONF.parent
FILES = shipped.files("conf/*/*.yaml")
OPTIONS = [(f.parent.name, f.stem) for f in FILES]
NODE_OPTIONS = [(group, option) for group, option in OPTIONS if group in NODES]
REQUIRED = {
    "single": ["loss.task=fine"],
    "static": ["loss.weights={fine: 2}"],
    "custom": ["loss.file=my_loss.py"],
    "pivrg": ["loss.baselines={fine: 60, coarse: 70}"],
    "amtl": ["loss.potentials={fine: 60, coarse: 70}"],
    "table": ["data.file=labels.csv", "data.labels={species: class}"],
    "other": ["optimizer._target_=torch.optim.RMSprop"],
    "union": ["data.parts=[synthetic]"],
}
# Where a YAML of ours says something else than its class, on purpose.
DIFFERENT = {
    ("data", "digits"): {"batch_size": 64},
    ("optimizer", "mtl_io"): {"lr": 5e-4},
    ("loss", "annealed_uncertainty"): {"hold": 0.15, "uncertainty": "term"},
    ("loss", "annealed_precision"): {"shape": "square", "end": 0.0, "uncertainty": "precision"},
    ("loss", "annealed_calibrated"): {"shape": "exponential", "start": 0.7, "end": 0.08, "gate": "calibrated"},
    ("loss", "annealed_boosted"): {"shape": "square", "start": 0.9, "end": 0.09, "gate": "boosted"},
    ("loss", "annealed_guarded"): {"end": 0.0, "gate": "guarded"},
}

# Made with the first release's code. A digest that changes orphans every user's finished runs: see ADDED and MOVED in
# mtl/config/identity.py.
SNAPSHOT = json.loads(Path(__file__).with_name("digests.json").read_text())

MY_LOSS = """
from torch import nn
class MultiTaskLoss(nn.Module):
    def forward(self, fine_loss, coarse_loss, epoch, total_epochs):
        return fine_loss + coarse_loss
"""
MY_MODULE = """
from typing import Annotated
from annotated_types import Gt, Lt
from mtl.losses import LossWeighting
class Mine(LossWeighting):
    def __init__(self, tasks, alpha: Annotated[float, Gt(0), Lt(1)] = 0.5):
        super().__init__(tasks)
        self.alpha = alpha
    def forward(self, losses, present=None):
        return self.alpha * losses.sum()
"""

OWN_DIGITS = """
from dataclasses import dataclass
from mtl.data.digits import Digits

@dataclass
class Own(Digits):
    shift: int = 0
"""


def composed(*overrides: str) -> tuple[dict, dict]:
    """The config as plain Python objects, and the option chosen in each group."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("config", overrides=fold(overrides), return_hydra_config=True)
    ours = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return with_parts(OmegaConf.to_container(ours, resolve=True), config.hydra), dict(config.hydra.runtime.choices)


def identity(*overrides: str):
    config, choices = composed(*overrides)
    check(config)
    return identify(config, choices)


def description(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if not line.startswith("# @package")]


@pytest.fixture(autouse=True)
def _fresh_console(monkeypatch):
    """The engine's console handler writes to the stdout of the test in which it was made: none may outlive its test."""
    monkeypatch.setattr(logging.getLogger("mtl"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("mtl"), "propagate", True)


@pytest.fixture
def outside(tmp_path_factory, monkeypatch) -> Path:
    """A user's own module and loss file, in a folder that is neither the repository nor the current one."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mymodule.py").write_text(MY_MODULE)
    (folder / "my_loss.py").write_text(MY_LOSS)
    monkeypatch.syspath_prepend(folder)
    return folder


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_passes_the_check(group, option, outside, monkeypatch):
    monkeypatch.chdir(outside)
    config, choices = composed(f"{group}={option}", *REQUIRED.get(option, ()))
    assert choices[group] == option
    check(config)
    name = " ".join([f"{group}={option}", *REQUIRED.get(option, ())])
    if name in SNAPSHOT:
        run = identify(config, choices)
        assert f"{run.group} {run.name}" == SNAPSHOT[name]
    if group in NODES and group not in ("arch", "sharing", "logger"):  # built elsewhere: large, or with side effects
        supplied = {"loss": {"tasks": ["fine", "coarse"]}, "optimizer": {"params": [torch.zeros(1)]}}
        built = build(config[group], group, **supplied.get(group, {}))
        assert isinstance(built, locate(config[group][TARGET], group))


@pytest.mark.parametrize("file", [CONF / "config.yaml", *FILES], ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_the_first_line_of_a_file_describes_it(file):
    first, second, *_ = description(file)
    assert re.match(r"# \S", first)
    assert not second.startswith("#") or first.endswith(".")  # a description over two lines would be cut in the help


@pytest.mark.parametrize(("group", "option"), NODE_OPTIONS)
def test_a_file_shows_all_parameters_with_their_defaults(group, option, monkeypatch):
    monkeypatch.delenv("MTL_DATA", raising=False)
    node = composed(f"{group}={option}", *REQUIRED.get(option, ()))[0][group]
    name = node.pop(TARGET)
    parameters = inspect.signature(locate(name, group)).parameters
    if not name.startswith("mtl."):  # PyTorch's own: the usual parameters suffice
        assert set(node) <= set(parameters) - {*NODES[group]}
        return
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    missing = [f"{key}: {json.dumps(defaults.get(key))}" for key in parameters if key not in {*node, *NODES[group]}]
    assert not missing, "\n".join([f"conf/{group}/{option}.yaml does not show all parameters; add:", *missing])
    assert set(node) == set(parameters) - {*NODES[group]}
    # As JSON, so that 1 is not 1.0 (their hashes differ) and a list is a tuple.
    different = {k: node[k] for k, v in defaults.items() if k in node and json.dumps(node[k]) != json.dumps(v)}
    assert different == DIFFERENT.get((group, option), {})


def test_a_class_outside_the_repository_is_configured_like_ours(outside):
    config, _ = composed("loss._target_=mymodule.Mine", "+loss.alpha=0.25")
    check(config)
    assert build(config["loss"], "loss", tasks=["fine", "coarse"]).alpha == 0.25


# ------------------------------------------------------------------------------------------------------ one-line errors

MINE = "loss._target_=mymodule.Mine"
ERRORS = [  # command line, exit code, what the line says
    # the option of a group
    ("loss=dwaa", 2, "loss=dwaa: no such option; did you mean dwa? python train.py --help lists all 5"),
    ("loss=PCGrad", 2, "did you mean pcgrad?"),
    ("loss=nash-mtl", 2, "did you mean nash_mtl?"),
    ("loss=zzzz", 2, "loss is one of aligned_mtl, ", ", …; python train.py --help lists all 5"),
    ("optimizer=rmsprop", 2, "optimizer is one of adam, adamw, "),
    # what other tools call our keys
    ("model=resnet18", 2, "did you mean arch=resnet18?"),
    ("dataset=digits", 2, "did you mean data=digits?"),
    ("wandb=false", 2, "logger=none"),
    ("resume=true", 2, "the same command again"),
    ("checkpoint=last.pt", 2, "the same command again"),
    ("max_epochs=3", 2, "did you mean trainer.epochs=3?"),
    ("batch_size=3", 2, "did you mean data.batch_size?"),
    # what the shell has taken apart
    ("loss=static loss.weights=fine:1 loss.weights=coarse:0.5", 2, "'loss.weights={fine: 1, coarse: 0.5}'"),
    ("loss=static loss.weights={fine: 1, coarse: 0.5}", 2, "'loss.weights={fine: 1, coarse: 0.5}'"),
    ("-m seed=interval(0,3)", 2, "seed=interval(0,3)", "hydra/sweeper=tpe"),
    ("experiment=smok", 2, "experiment=smok", "did you mean smoke?"),
    ("los=dwa", 2, "los:", "unknown key", "did you mean loss?"),
    ("lr=0.1", 2, "lr:", "unknown key", "did you mean optimizer.lr?"),
    ("epochs=3", 2, "epochs:", "unknown key", "did you mean trainer.epochs?"),
    ("loss=pgrad", 2, "loss=pgrad", "did you mean pcgrad or upgrad?"),
    ("loss=null", 2, "loss"),
    # type
    ("optimizer.lr=fast", 2, "optimizer.lr=fast", "number"),
    ("optimizer=adam optimizer.betas=[0.9]", 2, "optimizer.betas=[0.9]"),
    ("trainer.precision=bf61", 2, "trainer.precision=bf61", "'fp32' or 'bf16'", "did you mean bf16?"),
    # unknown key
    ("loss=dwa loss.temprature=1", 2, "loss.temprature", "unknown key", "did you mean temperature?"),
    ("loss=dwa +loss.temprature=1", 2, "loss.temprature", "unknown key", "did you mean temperature?"),
    ("+optimizer.dampenning=0", 2, "optimizer.dampenning", "did you mean dampening?"),
    ("loss=dwa +loss.tasks=3", 2, "loss.tasks", "unknown key"),
    ("+seeed=1", 2, "seeed", "did you mean seed?"),
    ("data=digits data.root=x", 2, "data.root", "unknown key"),
    # range
    ("output_root=''", 2, "output_root=''", "must name a folder"),
    ("seed=-1", 2, "seed=-1", "greater than or equal to 0"),
    ("loss=dwa loss.temperature=0", 2, "loss.temperature=0", "greater than 0"),
    ("schedule=multistep schedule.milestones=[0]", 2, "schedule.milestones=[0]", "greater than or equal to 1"),
    ("schedule.warmup_epochs=9 trainer.epochs=9", 2, "schedule.warmup_epochs=9", "less than trainer.epochs=9"),
    ("arch=wide_resnet arch.depth=30", 2, "arch.depth", "6n + 4"),
    ("arch=wide_resnet arch.width=0", 2, "arch.width"),
    ("arch=vgg16_bn data=digits", 2, "arch", "1x8x8"),
    ("optimizer.momentum=-1", 2, "optimizer", "momentum", "-1"),
    ("optimizer.lr=nan", 2, "optimizer.lr"),
    ("loss=uncertainty loss.lr=-1", 2, "loss.lr"),
    # missing, or not there
    ("loss=single", 2, "loss.task", "required", "loss.task=VALUE"),
    ("~optimizer", 2, "optimizer", "required"),
    ("optimizer=other", 2, "optimizer._target_", "required"),
    ("loss=static 'loss.weights={corse: 2}'", 2, "loss.weights", "'corse'", "fine, coarse"),
    ("loss=custom loss.file=nope.py", 2, "loss.file", "nope.py does not exist"),
    ("seed=${seedd}", 2, "seedd"),
    ("loss._target_=mtl.losses.DWAA", 2, "loss._target_=mtl.losses.DWAA", "did you mean mtl.losses.DWA?"),
    (
        "loss._target_=my_package.Mine",
        2,
        "No module named 'my_package'",
        "put my_package.py into the folder",
        "PYTHONPATH",
    ),
    ("loss._target_=mtl.losses", 2, "loss._target_=mtl.losses", "not a class or function"),
    # a class from outside, by the same schema
    (f"{MINE} +loss.alpha=1", 2, "loss.alpha=1", "less than 1"),
    (f"{MINE} +loss.alpha=x", 2, "loss.alpha=x", "number"),
    (f"{MINE} +loss.alhpa=0.3", 2, "loss.alhpa", "allowed: alpha;", "did you mean alpha?"),
    # the form of the command line
    ("--seed=0", 2, "--seed=0", "without dashes", "seed=VALUE"),
    ("seed = 3", 2, "'seed'", "KEY=VALUE", "spaces around ="),
    ("seed=0,1", 2, "seed=0,1", "python train.py -m seed=0,1"),
    ("-m seed=0,1 loss=dwa,dwaa", 2, "loss=dwaa", "did you mean dwa?"),
    # the machine
    ("data.root=nowhere data.download=false", 1, "nowhere/cifar-100-python", "data.root", "MTL_DATA"),
    ("data=digits logger=none output_root=a_file/out", 1, "cannot write to a_file/out", "output_root"),
    ("-m data=digits logger=none output_root=a_file/out", 1, "a_file/out", "output_root"),
    ("data=digits trainer.device=cuda:99", 1, "trainer.device=cuda:99", "CUDA devices", "trainer.device=auto or cpu"),
]
FOREIGN = ("Traceback", "Error executing", "Field required", "Input should")  # the words of other tools


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case[0])
def test_a_mistake_is_one_line_and_leaves_nothing(cli, outside, tmp_path, monkeypatch, recwarn, case):
    line, code, *parts = case
    monkeypatch.setattr("mtl.data.cifar100._download", lambda root: pytest.fail(f"{line}: not refused"))
    monkeypatch.setenv("MTL_DATA", "nowhere")
    (tmp_path / "a_file").touch()
    before = sorted(tmp_path.rglob("*"))
    result = cli(*shlex.split(line))
    assert sorted(tmp_path.rglob("*")) == before
    (text,) = result.err.splitlines()
    assert text.startswith("error: ") and result.code == code, text
    assert [part for part in parts if part not in text] == [], text
    assert [words for words in FOREIGN if words in text] == [], text
    # In a process of its own, a warning would be another line.
    assert [w for w in recwarn if issubclass(w.category, (UserWarning, RuntimeWarning, FutureWarning))] == []


def test_keys_that_a_file_leaves_out_are_those_of_its_class(cli, tmp_path, monkeypatch):
    """A YAML of a user's own needs only the class and what differs from its defaults."""
    (tmp_path / "own_digits.py").write_text(OWN_DIGITS)
    classes = {"data": "own_digits.Own", "loss": "mtl.losses.CAGrad", "optimizer": "torch.optim.Adam"}
    for node, target in classes.items():
        (tmp_path / "conf" / node).mkdir(parents=True)
        (tmp_path / "conf" / node / "strangers.yaml").write_text(f"# mine\n_target_: {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = ("--config-dir=conf", "data=strangers", "loss=strangers", "optimizer=strangers", "arch=resnet20",
            "logger=none", "trainer.epochs=1", "trainer.device=cpu", "seed=0")  # fmt: skip
    run = cli(*mine, "data.limit_train=64", "data.shift=2", "loss.c=0.2", "optimizer.lr=0.01")
    assert run.code == 0 and "64 train" in run.out, run.err
    config = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(*tmp_path.rglob("seed0/config.yaml")))))
    assert config["data"] == {TARGET: "own_digits.Own", "limit_train": 64, "shift": 2} and config["loss"]["c"] == 0.2
    again = cli(*shlex.split(re.search(r"^reproduce: python train.py (.*)$", run.out, re.M)[1]))
    assert again.code == 0 and "(delete that folder to run it again)" in again.out
    plan = cli("-m", *mine, "data.limit_train=64,128", "optimizer.lr=0.01", "study.plan=true")
    assert plan.code == 0 and "2 runs (2 new)" in plan.out and not plan.err
    for typo, nearest in {"data.limit_trian": "limit_train", "loss.C": "c", "optimizer.ams_grad": "amsgrad"}.items():
        wrong = cli(*mine, f"{typo}=1")
        assert wrong.code == 2 and f"error: {typo}: unknown key" in wrong.err and f"mean {nearest}?" in wrong.err
    assert len([*tmp_path.rglob("grid.json")]) == 0


def test_a_grid_over_options_takes_a_key_that_they_share_and_the_default_lacks(cli):
    small = ("data=rooms", "data.train_size=8", "data.test_size=4", "data.height=32", "data.width=32")
    rooms = ("-m", *small, "study.plan=true")
    plan = cli(*rooms, "arch=unet,fcn", "arch.width=4")
    assert plan.code == 0 and "2 runs (2 new)" in plan.out, plan.err
    wrong = cli(*rooms, "arch=unet,fcn", "arch.widht=4")
    assert wrong.code == 2 and "arch.widht: unknown key" in wrong.err
    some = cli(*rooms, "arch=fcn", "loss=cagrad,famo", "loss.gamma=0.1")
    assert some.code == 2 and "loss.gamma: unknown key; allowed: c, rescale" in some.err


def test_a_key_behind_the_double_star_needs_a_plus(cli, outside):
    (outside / "starred.py").write_text("def net(in_channels, tasks, width=1, **more):\n    raise ValueError(more)\n")
    wrong = cli("data=digits", "arch._target_=starred.net", "~arch.depth", "arch.height=2")
    assert "arch.height: unknown key; allowed: width" in wrong.err and "write +arch.height=2" in wrong.err


def test_the_version_is_ours(cli, capfd):
    with pytest.raises(SystemExit) as stop:
        cli("loss=dwa", "--version")
    assert not stop.value.code and re.fullmatch(r"mtl \d+\.\d+\.\d+\n", capfd.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------- grids


def test_a_refused_cell_does_not_stop_the_grid_and_0_is_a_seed(smoke, tmp_path):
    result = smoke("loss=single,equal", "seed=0", "-m")
    assert result.code == 2
    assert result.err.splitlines() == ["error: loss.task: required; set it with loss.task=VALUE"]
    assert "1 of 2 runs finished" in result.out and "refused: python train.py" in result.out
    assert re.search(r"^strategy +n .*\n(.*\n)?equal +1 ", result.out, re.M)
    (file,) = (tmp_path / "out").rglob("run.json")
    run = json.loads(file.read_text())
    assert run["status"] == "finished" and run["seed"] == 0
    assert file.parent == tmp_path / "out" / "synthetic" / "resnet20" / "equal" / run["digest"] / "seed0"
    sizes = ("data.train_size=64", "data.test_size=32", "data.batch_size=32")
    assert run["digest"] == identity("experiment=smoke", *sizes).digest


@pytest.mark.parametrize(("flag", "position"), [("-m", 1), ("-m", 2), ("--multirun", 2)])
def test_the_grid_flag_may_stand_anywhere(cli, flag, position):
    arguments = ["loss=dwa", "loss.temperature=0,-1"]  # both refused: nothing is trained
    arguments.insert(position, flag)
    result = cli(*arguments)
    assert result.code == 2 and "0 of 2 runs finished" in result.out
    assert re.findall(r"error: loss.temperature=(\S+):", result.err) == ["0", "-1"]


# ------------------------------------------------------------------------------------------------------------- identity

# fmt: off
SAME = [
    "seed=0", "output_root=elsewhere", "logger=none", "logger.project=x", "data.root=x", "data.download=false",
    "data.residency=host", "data.workers=0", "trainer.device=cpu",
    # the defaults, spelled out
    "loss.temperature=2.0", "loss.temperature=2", "data.val_fraction=0", "trainer.epochs=200", "data=cifar100",
    "optimizer.weight_decay=0.0005", "optimizer=sgd", "experiment=cifar100",
]
OTHER = [
    "loss.temperature=1.5", "loss=equal", "arch=resnet32", "data=digits", "data.batch_size=64", "data.val_fraction=0.1",
    "data.limit_train=5000", "data.limit_test=5000", "optimizer=adam", "optimizer.lr=0.2", "optimizer.nesterov=true",
    "schedule=constant", "schedule.warmup_epochs=5", "trainer.epochs=10", "trainer.precision=bf16",
]
# fmt: on


@pytest.mark.parametrize("override", SAME)
def test_the_identity_ignores_what_does_not_decide_the_numbers(override):
    assert identity("loss=dwa", override).group == identity("loss=dwa").group


@pytest.mark.parametrize("override", OTHER)
def test_the_identity_changes_with_what_decides_the_numbers(override):
    assert identity("loss=dwa", override).digest != identity("loss=dwa").digest


def test_a_custom_loss_is_its_content_not_its_path(tmp_path, monkeypatch):
    def digest(path):
        return identity("loss=custom", f"loss.file={path}").digest

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my_loss.py").write_text(MY_LOSS)
    monkeypatch.chdir(tmp_path / "a")
    assert digest("my_loss.py") == digest(tmp_path / "a" / "my_loss.py") == digest(tmp_path / "b" / "my_loss.py")
    before = digest("my_loss.py")
    Path("my_loss.py").write_text(MY_LOSS.replace("fine_loss + coarse_loss", "fine_loss - coarse_loss"))
    assert digest("my_loss.py") != before
    assert identity("loss=custom", "loss.file=my_loss.py").loss == "custom-my_loss"


# ----------------------------------------------------------------------------------------------------- help, completion

WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    sys.exit(end.code or ("torch was imported" if "torch" in sys.modules else 0))
"""


def without_torch(folder: Path, *arguments: str, line: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "train.py"), *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr, list(folder.iterdir())) == (0, "", [])
    return result.stdout


def test_help_lists_every_option_without_importing_torch(tmp_path):
    groups, listed, group = {g for g, _ in OPTIONS}, {}, None
    for line in without_torch(tmp_path, "--help").splitlines():
        word, _, text = line.strip().partition(" ")
        if word in groups and not text:
            group = word
        elif group and line.startswith("    "):
            listed[group, word] = text.strip()
    listed = {option: text for option, text in listed.items() if option in OPTIONS}  # not a user's own
    assert listed == {(f.parent.name, f.stem): description(f)[0].removeprefix("# ") for f in FILES}


@pytest.mark.parametrize(
    ("arguments", "line", "expected"),
    [
        ("-sc install=bash", "", "complete"),
        ("-sc query=bash", "train.py loss=pc", "loss=pcgrad"),
        ("-sc query=bash", "train.py loss=dwa loss.temp", "loss.temperature="),
        ("loss=dwa --cfg job", "", "temperature: 2.0"),
    ],
)
def test_completion_and_cfg_do_not_import_torch(tmp_path, arguments, line, expected):
    assert expected in without_torch(tmp_path, *arguments.split(), line=line)
