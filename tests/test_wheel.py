"""The wheel: built without a network, unpacked, and used from a folder in which nothing of the checkout is found."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from mtl.config import environment, program

SHORT = ("trainer.epochs=1", "data.limit_train=64", "data.limit_test=32", "logger=none")
# As pip's own bin/mtl-train.
LAUNCHER = """
import sys
from importlib.metadata import entry_points
(script,) = [e for e in entry_points(group="console_scripts") if e.name == "mtl-train"]
sys.exit(script.load()())
"""
SEVERAL = """
import runpy
import sys
for words in sys.argv[1:]:  # one process for them all: torch is imported once
    sys.argv = words.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("exit code", end.code or 0, "of", words)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The built file. Built from a copy, since setuptools leaves a build/ folder behind, which a later build reads."""
    source, out = tmp_path_factory.mktemp("source") / "mtl", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("mtl", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "train.py"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "-w", out, source]
    result = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed("-m", "mtl.report")` runs Python, `installed("mtl-train", …)` the command, in a folder of its own."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("user")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    launcher = site / "bin" / "mtl-train"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def call(*words: str, code: int = 0) -> str:
        words = [str(launcher) if word == "mtl-train" else word for word in words]
        result = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert str(ROOT) not in result.stdout + result.stderr.replace(sys.executable, "")
        return result.stdout + result.stderr

    call.folder = folder
    return call


def test_the_wheel_holds_every_module_config_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in ((ROOT / "mtl", "mtl"), (ROOT / "conf", "mtl/conf")):
        files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"]
        assert len(files) > 60
        assert {f"{target}/{file.relative_to(folder)}" for file in files} <= names
    assert not [name for name in names if not name.startswith(("mtl/", "mtl-"))]


def test_the_command_trains_and_reproduces(installed):
    out = installed("mtl-train", "data=digits", *SHORT)
    assert f"reproduce: mtl-train data=digits {' '.join(SHORT)}\n" in out
    run = next((installed.folder / "outputs" / "digits").rglob("run.json"))
    assert '"commit": null' in run.read_text() and '"mtl": "0.1.0"' in run.read_text()


def test_a_grid_over_own_configs_and_classes_and_the_report(installed):
    """The class lies in the current folder, which a command in bin/ does not find by itself."""
    (installed.folder / "my_package.py").write_text(
        "from mtl.losses.base import LossWeighting, masked\n\n"
        "class Mine(LossWeighting):\n"
        "    def forward(self, losses, present=None):\n"
        "        return masked(losses, present).square().sum().sqrt()\n"
    )
    folder = installed.folder / "my_configs" / "loss"
    folder.mkdir(parents=True)
    (folder / "strangers.yaml").write_text("# Root of the sum of squares\n_target_: my_package.Mine\n")
    out = installed("mtl-train", "-m", "--config-dir", "my_configs", "data=digits", *SHORT, "loss=strangers,equal")
    assert "2 of 2 runs finished" in out and re.search(r"^next:     mtl-train ", out, re.MULTILINE)
    report = installed("-m", "mtl.report", "outputs", "--format", "md")
    assert re.search(r"^strangers +1 ", report, re.MULTILINE) and re.search(
        r"mtl-train .*-m loss=single loss\.task=digit", report
    )


def test_help_completion_and_mistakes_name_the_command(installed):
    text = installed("mtl-train", "--help")
    assert "  mtl-train arch=resnet56 loss=uncertainty " in text and "train.py" not in text
    assert re.search(r"^    pcgrad +PCGrad", text, re.MULTILINE)
    assert "-F hydra_bash_completion mtl-train" in installed("mtl-train", "-sc", "install=bash")
    assert "which needs -m: mtl-train -m loss=dwa,pcgrad" in installed("mtl-train", "loss=dwa,pcgrad", code=2)


def test_certificates_and_studies_without_the_tests(installed):
    (installed.folder / "own.py").write_text(
        "import torch\n\nclass MultiTaskLoss(torch.nn.Module):\n"
        "    def forward(self, a, b, epoch, total):\n        return a + 2 * b\n"
    )
    words = [
        "mtl.certify loss=cagrad",
        "mtl.certify loss=custom loss.file=own.py",
        "mtl.certify check",
        "mtl.studies.toy trajectories equal --cap 3 --setting nash",
        "mtl.studies.scale_invariance equal/sgd --epochs 2",
    ]
    text = installed("-c", SEVERAL, *words)
    assert re.findall(r"exit code (\d)", text) == ["0", "0", "2", "0", "0"]
    method, own = text.split("# `loss=")[1:3]
    assert "mtl-train loss=cagrad" in method
    assert "over ten steps | not measured: the oracles are in tests/oracles of the repository |" in method
    assert "mtl-train loss=custom loss.file=own.py" in own and "| yes |" in own
    assert "note: agreement with the oracles is not measured" in text and "this is an installed package" in text
    for file in ("toy-study/trajectories.md", "invariance/invariance.md"):
        assert (installed.folder / "outputs" / file).exists()


def test_a_study_starts_runs_by_the_installed_module(installed):
    words = "from mtl.config.program import child, checkout; print(child()[1:], checkout())"
    assert installed("-c", words) == "['-m', 'mtl.train'] None\n"


# ------------------------------------------------------------------------------------------- the words that start a run


@pytest.mark.parametrize(
    ("started", "here", "torchrun", "expected"),
    [
        ("train.py", True, False, "python train.py"),
        ("../mtl/train.py", False, False, "python ../mtl/train.py"),
        ("train.py", True, True, "torchrun --nproc-per-node=2 train.py"),
        ("/env/bin/mtl-train", True, False, "mtl-train"),
        ("/env/bin/mtl-train", False, True, "torchrun --nproc-per-node=2 -m mtl.train"),
        (str(ROOT / "mtl" / "train.py"), False, False, "python -m mtl.train"),
        ("/env/submitit/core/_submit.py", True, False, "python train.py"),
        ("/env/submitit/core/_submit.py", False, False, "mtl-train"),
    ],
)
def test_the_printed_program_is_the_one_that_works_here(started, here, torchrun, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.chdir(ROOT if here else tmp_path)
    if torchrun:
        for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(key, value)
    assert " ".join(program.program()) == expected


@pytest.mark.parametrize(
    ("command", "start", "rest"),
    [
        ("python train.py loss=dwa seed=1", "python train.py", "loss=dwa seed=1"),
        ("mtl-train -m loss=dwa", "mtl-train", "-m loss=dwa"),
        ("python -m mtl.train loss=dwa", "python -m mtl.train", "loss=dwa"),
        ("torchrun --nproc-per-node=2 train.py loss=dwa", "python train.py", "loss=dwa"),
        ("torchrun --nproc-per-node=2 -m mtl.train loss=dwa", "python -m mtl.train", "loss=dwa"),
        ("", "python train.py", ""),
    ],
)
def test_a_command_is_divided_into_program_and_options(command, start, rest):
    assert [" ".join(words) for words in program.divide(command.split())] == [start, rest]


# --------------------------------------------------------------------------------------------------- the wrong Python


def test_every_dependency_is_looked_for():
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    assert sorted(environment.PACKAGES.values()) == sorted(re.findall(r'^  "([\w-]+)', listed, re.MULTILINE))
    (versions,) = re.findall(r'requires-python = "([^"]+)"', text)
    assert versions == ">={}.{},<{}.{}".format(*environment.OLDEST, *environment.TOO_NEW)


@pytest.mark.parametrize(
    "words", [["train.py"], ["-m", "mtl.report"], ["-m", "mtl.studies.toy"], ["-m", "mtl.certify"]]
)
def test_a_python_without_the_packages_gets_one_line(words):
    # -S: without site-packages.
    result = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"error: \S+ lacks torch, torchvision, hydra-core, .*\n", result.stderr)


def test_an_environment_that_is_not_activated_is_named_before_commands(monkeypatch, tmp_path):
    """Every printed command starts with `python`."""
    root, folder = tmp_path / "here", tmp_path / "here" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").touch()
    (folder / "python").touch(mode=0o755)
    monkeypatch.chdir(root)
    monkeypatch.delenv("MAKELEVEL", raising=False)
    monkeypatch.setattr(environment, "__file__", str(root / "mtl" / "config" / "environment.py"))
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert environment.activation() == "source .venv/bin/activate"
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin")
    assert environment.activation() == ""
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    (root / "pyproject.toml").touch()
    with pytest.raises(SystemExit, match=r"lacks torch.*; type: source \.venv/bin/activate"):
        environment.require()


def test_quickstart_says_how_to_go_on_and_takes_a_smaller_torch():
    def steps(*words):
        command = ["make", "-n", "-B", "quickstart", *words]
        # The suite itself may run under make: without its variables this make prints no "Entering directory".
        own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout

    plain, small = steps(), steps("TORCH=cpu")
    assert "source .venv/bin/activate" in plain.splitlines()[-1] and "--index-url" not in plain
    assert "--index-url https://download.pytorch.org/whl/cpu torch torchvision" in small
    assert "--quiet" not in plain  # several GB without a sign of life


def test_another_python_gets_one_line(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"is Python 3.9; 3.10 to 3.13 is needed"):
        environment.require()
