"""The layout of the package: imports go down through the floors, in no circle; a public class name occurs once."""

from __future__ import annotations

import ast
import subprocess
import sys
import traceback
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import shipped

ROOT = Path(__file__).parents[1]

# From the ground up. A module may import its own package and whatever stands before it.
FLOORS = ("errors", "random", "config", "losses", "optim", "views", "metrics", "tasks", "data", "archs", "parallel",
          "inspect", "tracking", "engine", "report", "cli", "certify", "studies", "api", "evaluate",
          "predict", "train", "__main__")  # fmt: skip


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package except the package itself, whose few lines every import runs."""
    found = {}
    for file in shipped.files("mtl/**/*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file, ast.parse(file.read_text())
    del found["mtl"]
    return found


@cache
def imports() -> dict[str, set[str]]:
    """{module: the modules of ours that it imports}, inside of functions and under TYPE_CHECKING as well."""
    known, found = modules(), {}
    for name, (file, tree) in known.items():
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*start, *(node.module.split(".") if node.module else [])])
                wanted = [f"{origin}.{alias.name}" for alias in node.names]
                wanted = [w if w in known else origin for w in wanted]
            else:
                continue
            found[name] |= {w for w in wanted if w in known and w != name}
    return found


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


def test_every_package_has_a_floor():
    assert {name.split(".")[1] for name in modules()} == set(FLOORS)


def test_no_import_goes_up():
    up = [f"{a} imports {b}" for a, targets in imports().items() for b in targets if floor(b) > floor(a)]
    assert not sorted(up)


def test_no_circle():
    """Modules without imports are taken away until none is left; what stays goes in a circle."""
    left = {name: set(targets) for name, targets in imports().items()}
    while ready := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in ready}
    assert not {name: sorted(targets & left.keys()) for name, targets in left.items()}


def test_a_public_class_name_occurs_once():
    places = defaultdict(list)
    for name, (_, tree) in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert not {k: v for k, v in places.items() if len(v) > 1}


@pytest.mark.parametrize("what", ["mtl.errors", "mtl.config", "mtl.cli.command"])
def test_no_torch_where_help_must_be_instant(what):
    wanted = [name for name in modules() if name == what or name.startswith(f"{what}.")]
    code = f"import {', '.join(wanted)}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_module_says_what_it_is():
    assert not [name for name, (_, tree) in modules().items() if not ast.get_docstring(tree)]


def test_from_the_command_to_a_method_there_are_seven_frames_of_ours(smoke, monkeypatch):
    """main, the cell, the run, the epoch, the step, its gradients, the method."""
    frames = []

    def weights(self, gramian):
        frames.extend(f.name for f in traceback.extract_stack() if f.filename.startswith(str(ROOT / "mtl")))
        raise KeyboardInterrupt

    monkeypatch.setattr("mtl.losses.PCGrad.weights", weights)
    assert smoke("loss=pcgrad", "logger=none").code == 130
    assert frames[frames.index("main") :] == [
        "main", "run_from_hydra", "execute", "train_epoch", "__call__", "gradients",
    ]  # fmt: skip
