"""Do two commits train the same numbers, bit for bit, on this machine? For a refactoring that must not change any.

    python benchmarks/same_bits.py main              the working tree beside the commit `main`: all runs, 10 minutes
    python benchmarks/same_bits.py v1 v2 --quick     two commits; each loss on digits, with and without all labels
    python benchmarks/same_bits.py HEAD --losses dwa mgda --only synthetic

Each run has three epochs of the commit's own train.py, in a process of its own. In the third epoch DWA begins to
weigh. Every loss runs on digits and synthetic images, from memory and through a DataLoader, with one task, and with
missing labels. All other golden runs (tests/golden) follow. These parts are compared: the exit code, the run's folder
(its identity), all columns of metrics.jsonl except times, and the bytes of the model's tensors in last.pt. Each
difference is one line. The exit code is 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOST = ("data.residency=host", "data.workers=0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", default=".", help="another commit; default: the working tree")
    parser.add_argument("--losses", nargs="+", help="these losses only, and no other golden runs")
    parser.add_argument(
        "--only", metavar="PREFIX", help="runs whose name starts like that, such as archs or missing/mgda"
    )
    parser.add_argument("--quick", action="store_true", help="no other data sets than digits, no other golden runs")
    options = parser.parse_args()
    cases = {n: c for n, c in _cases(options.losses, options.quick).items() if n.startswith(options.only or "")}
    if not cases:
        parser.error("no run is left; see tests/golden/cases.py for the names")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-")))
        (folder / "cases.json").write_text(json.dumps(cases))
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the checkouts are removed
        commits = {"a": options.base, "b": options.head}
        trees = {side: stack.enter_context(_tree(commit, folder / side)) for side, commit in commits.items()}
        outputs = [folder / "outputs" / side for side in trees]
        workers = [_start(tree, folder / "cases.json", out) for tree, out in zip(trees.values(), outputs, strict=True)]
        for worker in workers:
            stack.callback(worker.terminate)
        if any([worker.wait() for worker in workers]):
            sys.exit("error: a side could not run at all, see above")
        seen = [[_outcome(out / str(i)) for i in range(len(cases))] for out in outputs]
    return _compare(list(cases), *seen)


def _cases(losses: list[str] | None, quick: bool) -> dict[str, list[str]]:
    """{name of a run: its overrides}."""
    sys.path.insert(0, str(ROOT / "tests"))
    from golden.cases import ALONE, FAMILIES, NET, SYNTHETIC

    cases = {f"{family}/{n}": case for family in ("losses", "missing") for n, case in FAMILIES[family].items()}
    if not quick:
        cases |= {f"host/{n}": (*case, *HOST) for n, case in FAMILIES["losses"].items()}
        cases |= {f"host-missing/{n}": (*case, *HOST) for n, case in FAMILIES["missing"].items()}
        for name in FAMILIES["losses"].keys() - {"custom"}:  # the class of `custom` takes three tasks only
            cases[f"alone/{name}"] = (*NET, *ALONE, f"loss={name}", *_needed(name, "digit"))
            cases[f"synthetic/{name}"] = (*NET, *SYNTHETIC, f"loss={name}", *_needed(name, "fine", "coarse"))
            cases[f"host-synthetic/{name}"] = (*cases[f"synthetic/{name}"], *HOST)
            cases[f"resnet/{name}"] = ("arch=resnet20", *SYNTHETIC, f"loss={name}", *_needed(name, "fine", "coarse"))
    if losses:
        cases = {n: case for n, case in cases.items() if n.partition("/")[2] in losses}
    elif not quick:
        cases |= {f"{family}/{n}": case for family in ("archs", "variants") for n, case in FAMILIES[family].items()}
    return {name: [*case, "trainer.epochs=3"] for name, case in cases.items()}


def _needed(loss: str, *tasks: str) -> list[str]:
    """Example values for the required arguments of a loss."""
    numbers = "{" + ", ".join(f"{task}: {50 + 20 * i}" for i, task in enumerate(tasks)) + "}"
    arguments = {"amtl": f"potentials={numbers}", "pivrg": f"baselines={numbers}", "static": f"weights={numbers}"}
    arguments["single"] = f"task={tasks[0]}"
    return [f"loss.{arguments[loss]}"] if loss in arguments else []


@contextmanager
def _tree(commit: str, folder: Path):
    """Yield the folder of a checkout of `commit`. For `.` it is the working tree itself."""
    if commit == ".":
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    if subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit]).returncode:
        sys.exit(2)
    try:
        if not (folder / "tests/golden/problems.py").exists():
            sys.exit(f"error: {commit} is older than tests/golden, whose networks and data sets are trained")
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)])


# -- training: one process for each side, which forks a child for each run ---------------------------------------------


def _start(tree: Path, cases: Path, out: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(tree), str(tree / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, __file__, "--train", str(tree), str(cases), str(out)], env=env)


def _train(tree: Path, cases: Path, out: Path) -> None:
    # Imported once, before the forks, so that no child spends seconds on it.
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401  optimizers import it

    with suppress(ImportError):  # an older commit may not have this module
        import mtl.cli.cell  # noqa: F401
    os.fsync = lambda file: None  # faster; these files need not survive a power cut
    for i, overrides in enumerate(json.loads(cases.read_text()).values()):
        (out / str(i)).mkdir(parents=True)
        if (child := os.fork()) == 0:
            _run(tree, overrides, out / str(i))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (out / str(i) / "code").write_text(str(code))


def _run(tree: Path, overrides: list[str], out: Path) -> None:
    """Run train.py in this child process as if it were called with these arguments. It never returns."""
    os.chdir(out)
    with open("log", "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    sys.argv = ["train.py", *overrides, "output_root=runs"]
    code = 99
    try:
        runpy.run_path(str(tree / "train.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(code)


# -- comparing ---------------------------------------------------------------------------------------------------------


def _outcome(folder: Path) -> dict:
    """The result of a run: exit code, error, identity, columns and hashes of the tensors."""
    import torch

    log = (folder / "log").read_text().strip().splitlines()
    found = {"code": (folder / "code").read_text(), "error": next((x for x in log if x.startswith("error:")), "")}
    found |= {"identity": None, "columns": {}, "tensors": {}}
    for file in (folder / "runs").rglob("metrics.jsonl"):
        rows = [json.loads(line, parse_float=str) for line in file.read_text().splitlines()]
        keys = sorted({key for row in rows for key in row if not key.startswith("time/")})
        found["identity"] = str(file.parent.relative_to(folder / "runs"))
        found["columns"] = {key: [str(row.get(key)) for row in rows] for key in keys}
        if (last := file.parent / "last.pt").exists():
            model = torch.load(last, weights_only=True)["model"]
            found["tensors"] = {name: _sha(tensor) for name, tensor in model.items()}
    return found


def _sha(tensor) -> str:
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.contiguous().reshape(-1).numpy().tobytes()).hexdigest()[:12]


def _compare(names: list[str], before: list[dict], after: list[dict]) -> int:
    """Print a line for each difference, then the counts; return the exit code."""
    counts = Counter()
    for name, old, new in zip(names, before, after, strict=True):
        lines = _differences(old, new)
        for line in lines:
            print(f"{name}: {line}")
        trained = "trained alike" if old["tensors"] else f"refused alike ({old['error'] or 'exit code ' + old['code']})"
        counts["different" if lines else trained] += 1
        if not lines and old["tensors"].keys() != new["tensors"].keys():
            counts["alike, but with other names of the model's tensors"] += 1
    for what, count in counts.most_common():
        print(f"{count:5d} {what}")
    return int(bool(counts["different"]) or not any(found["tensors"] for found in before))


def _differences(old: dict, new: dict) -> list[str]:
    if old["code"] != new["code"]:
        return [
            f"exit code {old['code']} -> {new['code']}, {old['error'] or 'no error'} -> {new['error'] or 'no error'}"
        ]
    lines = [f"{key} {old[key]} -> {new[key]}" for key in ("error", "identity") if old[key] != new[key]]
    for key in sorted(old["columns"].keys() | new["columns"].keys()):
        pairs = old["columns"].get(key, ["no such column"]), new["columns"].get(key, ["no such column"])
        if pairs[0] != pairs[1]:
            lines.append(f"{key} {', '.join(pairs[0])} -> {', '.join(pairs[1])}")
    if old["tensors"].keys() == new["tensors"].keys():
        lines += [f"the weights {n} have other bits" for n, sha in old["tensors"].items() if new["tensors"][n] != sha]
    elif Counter(old["tensors"].values()) != Counter(new["tensors"].values()):
        lines.append(f"the weights have other names, and {_others(old, new)} of {len(old['tensors'])} other bits")
    return lines


def _others(old: dict, new: dict) -> int:
    return (Counter(old["tensors"].values()) - Counter(new["tensors"].values())).total()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        _train(*map(Path, sys.argv[2:]))
    else:
        sys.exit(main())
