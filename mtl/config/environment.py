"""Checks that this Python can run mtl. It needs the standard library only and runs before all other imports of mtl."""

import importlib.util
import os
import shutil
import sys

OLDEST, TOO_NEW = (3, 10), (3, 14)  # requires-python in pyproject.toml

# {module: package that contains it}, for all dependencies in pyproject.toml. The names differ: yaml is in pyyaml.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "wandb": "wandb",
    "pydantic": "pydantic",
    "annotated_types": "annotated-types",
    "filelock": "filelock",
    "yaml": "pyyaml",
    "numpy": "numpy",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "plotly": "plotly",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}


def activation() -> str:
    """What to type before commands that start with `python`, if the word means another Python now; empty if not."""
    folder = os.path.join(sys.prefix, "bin")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script = os.path.join(root, ".venv", "bin", "activate")
    if folder != os.path.dirname(script) or not os.path.exists(script) or "MAKELEVEL" in os.environ:  # make says it
        return ""
    found = shutil.which("python")
    return "" if found and os.path.dirname(found) == folder else f"source {os.path.relpath(script)}"


def require() -> None:
    """End the process with one line and exit code 1 if this Python is too old, too new, or lacks a package."""
    version = "{}.{}".format(*sys.version_info[:2])
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        wrong, cure = f"is Python {version}; 3.10 to 3.13 is needed", "try: make PYTHON=python3.12"
    else:
        missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
        if not missing:
            return
        wrong, cure = "lacks " + ", ".join(missing), "install what is missing: pip install -e ."
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    python = os.path.join(root, ".venv", "bin", "python")  # the environment that `make` creates
    # The cure depends on the place: an installed package; a checkout whose environment was not used; or neither.
    if not os.path.exists(os.path.join(root, "pyproject.toml")):
        cure = "install mtl into another environment: python3.12 -m venv, then pip install"
    elif os.path.exists(python) and os.path.abspath(sys.executable) != python:
        activate = os.path.relpath(os.path.join(root, ".venv", "bin", "activate"))
        cure = f"type: source {activate} (or {os.path.relpath(python)} instead of python)"
    sys.exit(f"error: {sys.executable} {wrong}; {cure}")
