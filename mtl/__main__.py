"""`python -m mtl`: all commands, one line each; `python -m mtl --version`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mtl import __version__
from mtl.errors import suggest

COMMANDS = {
    "mtl.train": "train a run, or a grid of runs with -m; --help lists every option",
    "mtl.report": "finished runs to tables, figures and a page",
    "mtl.evaluate": "losses and metrics of a run's checkpoint, on its data or on changed data",
    "mtl.predict": "what a run says about image files or arrays, as CSV or arrays",
    "mtl.certify": "a method against its equation: properties that are measured",
    "mtl.studies.scale_invariance": "how methods bear losses of other scales",
    "mtl.studies.toy": "how methods move on the toy problem",
    "mtl.studies.tuned_rates": "methods with a learning rate tuned for each",
}


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    words = list(arguments)
    if words == ["--version"]:
        print(f"mtl {__version__}")
        return 0
    if words and words not in (["-h"], ["--help"]):
        names = [name.partition(".")[2] for name in COMMANDS]
        hint = suggest(words[0], names).replace("did you mean ", "did you mean python -m mtl.")
        print(f"error: {words[0]}: no such command; python -m mtl lists them all{hint}", file=sys.stderr)
        return 2
    width = max(map(len, COMMANDS))
    print(f"mtl {__version__}: multi-task learning. Commands; each has --help:\n")
    for name, what in COMMANDS.items():
        print(f"  python -m {name:{width}s}  {what}")
    print("\nFrom Python: mtl.train, mtl.grid, mtl.load; in your own loop: mtl.backward, mtl.Step.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
