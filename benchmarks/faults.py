"""Faults on purpose: kills, signals, damaged files, full disks, odd options, odd run folders. Does every run survive?

    python benchmarks/faults.py                       all campaigns, 20 cases each (options: 500)
    python benchmarks/faults.py kills files --cases 200 --seconds 600

Every case is a forked process on the digits. A run survives a fault in two ways. It ends with the numbers of an
undisturbed run, bit for bit. Or it ends with one line that names the fault, and all files stay as they were. The exit
code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml
from damage import DAMAGE, FILES, change_field
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import train
from mtl.cli.command import CONF, GROUPS, launch, translate
from mtl.config.identity import identify
from mtl.engine import checkpoint
from mtl.engine.build import assemble, check, open_batches
from mtl.errors import UserError
from mtl.report import __main__ as report
from mtl.tracking.console import table

LIMIT = 120.0  # seconds of one process: whatever takes longer hangs
MEMORY = 16 * 2**30  # bytes of address space for a process that tries odd options
SMALL = ("data=digits", "data.limit_train=64", "data.limit_test=40", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "arch.dropout=0.2", "optimizer.lr=0.01", "trainer.epochs=4", "logger=none",
         "output_root=o")  # fmt: skip
VARIANTS = ("loss=equal", "loss=uncertainty optimizer=adam", "loss=pcgrad", "loss=dwa", "loss=graddrop",
            "loss=gradnorm", "loss=moco", "loss=famo optimizer=adamw", "loss=equal optimizer=mtl_io")  # fmt: skip


@dataclass
class Ended:
    """How a process ended: its exit code and its output. The code is None if it took too long and was killed."""

    code: int | None
    out: str
    err: str

    @property
    def one_line(self) -> bool:
        """Whether it ended with one error line of ours."""
        return self.code in (1, 2) and self.err.startswith("error: ") and self.err.count("\n") == 1

    @property
    def traceback(self) -> bool:
        return "Traceback" in self.out + self.err


class Faults:
    """The cases of all campaigns. Each case yields what failed, or an empty string.

    Args:
        folder: the folder for all runs.
        rng: random generator that decides every case.
    """

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng, self.number = folder, rng, 0
        self.whole: dict[str, tuple[Path, float]] = {}

    # -- processes ----------------------------------------------------------------------------------------------------

    def fork(self, folder: Path, action: Callable[[], int], signals: list[tuple[float, int]] = ()) -> Ended:
        """Run `action` in a child process in `folder`.

        Args:
            folder: working directory of the child; its output goes there as well.
            action: returns the exit code.
            signals: (seconds, signal) pairs; each signal is sent to the child after that many seconds.
        """
        outputs = [folder / f"{name}.txt" for name in ("out", "err")]
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            code = 70
            try:
                os.chdir(folder)
                for number, file in enumerate(outputs, start=1):
                    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                code = action()
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        begun, status, waiting = time.monotonic(), None, sorted(signals)
        while status is None:
            done, raw = os.waitpid(child, os.WNOHANG)
            passed = time.monotonic() - begun
            if done:
                status = os.waitstatus_to_exitcode(raw)
            elif passed > LIMIT:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            elif waiting and passed >= waiting[0][0]:
                os.kill(child, waiting.pop(0)[1])
            else:
                time.sleep(0.002)
        return Ended(status, *(file.read_text(errors="replace") for file in outputs))

    def run(self, folder: Path, options: str, signals=(), before: Callable[[], None] = lambda: None) -> Ended:
        """Run train.py with SMALL and `options` in a process of its own."""

        def action() -> int:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logging.getLogger("mtl").handlers = []
            sys.argv = ["train.py", *SMALL, *options.split()]
            before()
            return launch(train.main)

        return self.fork(folder, action, signals)

    def new(self) -> Path:
        """An empty folder."""
        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        return folder

    def undisturbed(self, options: str) -> tuple[Path, float]:
        """The folder of an undisturbed run, and the seconds that it took."""
        if options not in self.whole:
            folder, since = self.new(), time.monotonic()
            ended = self.run(folder, options)
            assert ended.code == 0, ended.err or ended.out
            self.whole[options] = folder, time.monotonic() - since
        return self.whole[options]

    def stopped(self, options: str, epochs: int = 2) -> Path:
        """A new folder with a run that stopped after `epochs`."""

        def break_off() -> None:
            from mtl.engine.learner import Learner

            real = Learner.train_epoch
            Learner.train_epoch = lambda *a: real(*a) if a[2] < epochs else 1 / 0

        key = f"{options} stopped {epochs}"
        if key not in self.whole:
            folder = self.new()
            ended = self.run(folder, options, before=break_off)
            assert ended.code == 1, ended.err
            self.whole[key] = folder, 0.0
        return self.copied(self.whole[key][0])

    def copied(self, folder: Path) -> Path:
        copy = self.new()
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        return copy

    def difference(self, folder: Path, options: str, without: str = "") -> str:
        """The difference between a finished run and the undisturbed one; empty if there is none."""
        try:
            ours, theirs = (content(only(f), without) for f in (folder, self.undisturbed(options)[0]))
        except (UserError, OSError, ValueError, KeyError) as error:
            return f"unreadable: {error}"
        for key in theirs:
            if not same(ours[key], theirs[key]):
                return f"other {key}"
        return ""

    # -- campaigns ----------------------------------------------------------------------------------------------------

    def kills(self) -> Iterator[str]:
        """Kill a run one to three times, at random moments by random signals. Then let the same command finish."""
        while True:
            options = self.rng.choice(VARIANTS)
            seconds, folder = self.undisturbed(options)[1], self.new()
            failure = ""
            for _ in range(self.rng.randint(1, 3)):
                number = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                before = [file.read_bytes() for file in folder.rglob("run.json")]
                ended = self.run(folder, options, [(self.rng.uniform(0, 1.1 * seconds), number)])
                # Ended before it began: the status is still that of an earlier death, which may have been SIGKILL.
                if before != [file.read_bytes() for file in folder.rglob("run.json")]:
                    failure = failure or stopped_well(ended, folder, {number})
            yield failure or self.goes_on(folder, options)

    def signals(self) -> Iterator[str]:
        """Send two to four SIGINT and SIGTERM in a row. Then let the same command finish."""
        while True:
            options = self.rng.choice(VARIANTS[:3])
            seconds, folder = self.undisturbed(options)[1], self.new()
            first = self.rng.uniform(0.05, 1.1 * seconds)
            numbers = [self.rng.choice([signal.SIGTERM, signal.SIGINT]) for _ in range(self.rng.randint(2, 4))]
            times = [first + i * self.rng.choice([0.0, 0.01, 0.1]) for i in range(len(numbers))]
            ended = self.run(folder, options, list(zip(times, numbers, strict=True)))
            yield stopped_well(ended, folder, set(numbers)) or self.goes_on(folder, options)

    def files(self) -> Iterator[str]:
        """Do each kind of damage to each file of an interrupted and of a finished run. Then run the same command."""
        options = "loss=equal"
        cases = [(file, damage, done) for file in FILES for damage in DAMAGE for done in (False, True)]
        self.rng.shuffle(cases)
        for file, damage, done in cases:
            folder = self.copied(self.undisturbed(options)[0]) if done else self.stopped(options)
            path = only(folder) / file
            if not path.exists():
                continue
            other = only(self.stopped(f"{options} seed=7")) / file
            DAMAGE[damage](path, other, self.rng)
            before = snapshot(path.parent)
            ended = self.run(folder, options)
            name = f"{file} {damage}{' (finished)' if done else ''}"
            if ended.code is None:
                failure = "hangs"
            elif ended.traceback:
                failure = "traceback"
            elif ended.one_line:
                failure = "" if snapshot(path.parent) == before and file in ended.err else "changed, or not named"
            elif ended.code == 0:
                # A lost best.pt may be said, the last.pt of a finished run too, and nothing else may be lost.
                said = file if file == "best.pt" or (done and file == "last.pt") else ""
                failure = self.difference(folder, options, without=said if said and said in ended.out else "")
            else:
                failure = f"code {ended.code}"
            yield failure and f"{name}: {failure}"

    def disk(self) -> Iterator[str]:
        """Let the nth write fail: the disk is full, or a folder is gone. Then let the same command finish."""
        options = "loss=equal"
        while True:
            folder, code = self.new(), self.rng.choice([errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOENT])
            number, lasting = self.rng.randint(0, 40), self.rng.random() < 0.5

            def full(number=number, code=code, lasting=lasting) -> None:
                calls = iter(range(10**9))

                def refuse(path: Any) -> None:
                    if "/o/digits/" in str(Path(path).absolute()) and Path(path).suffix != ".lock":
                        n = next(calls)
                        if n == number or (lasting and n > number):
                            raise OSError(code, os.strerror(code), str(path))

                # As the operating system refuses: by the name that is opened, renamed onto or synced.
                real_open, real_replace, real_fsync = Path.open, os.replace, os.fsync
                Path.open = lambda p, mode="r", *a, **k: (
                    (any(m in mode for m in "wa+") and refuse(p)) or real_open(p, mode, *a, **k)
                )
                os.replace = lambda a, b: refuse(b) or real_replace(a, b)
                os.fsync = lambda number: refuse(os.readlink(f"/proc/self/fd/{number}")) or real_fsync(number)

            ended = self.run(folder, options, before=full)
            left = [f.name for f in folder.rglob("*.tmp")]
            if ended.code is None or ended.traceback:
                failure = "hangs" if ended.code is None else "traceback"
            elif ended.code != 0 and not (ended.one_line and "cannot write" in ended.err and "o/digits" in ended.err):
                failure = f"no line that names the file: {ended.err[:80]!r}"
            else:
                failure = f"left {left}" if left and not lasting else ""
            where = f"write {number} {errno.errorcode[code]}"
            yield f"{where}: {failure}" if failure else self.goes_on(folder, options)

    def options(self) -> Iterator[str]:
        """Give an option of the real config groups an odd value. It must be built, or refused in one line."""
        pairs = [(group, key) for group, keys in config_keys().items() for key in keys]
        while True:
            chunk = [(*self.rng.choice(pairs), self.rng.choice(VALUES)) for _ in range(25)]
            folder = self.new()

            def action(chunk=chunk) -> int:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                for group, key, value in chunk:
                    signal.setitimer(signal.ITIMER_PROF, 30)  # of its own work: a loaded machine is no fault
                    print(json.dumps([f"{group} {key}={value}", try_option(group, f"{key}={value}")]), flush=True)
                return 0

            ended = self.fork(folder, action)
            found = [json.loads(line) for line in ended.out.splitlines() if line.startswith("[")]
            for name, failure in found:
                yield failure and f"{name}: {failure}"
            if len(found) < len(chunk):
                group, key, value = chunk[len(found)]
                yield f"{group} {key}={value}: the process ended (code {ended.code})"

    def report(self) -> Iterator[str]:
        """Do one random damage to one file of a tree of six runs. Then write the report."""
        tree = self.new()
        for seed in range(3):
            for loss in ("equal", "dwa"):
                shutil.copytree(self.undisturbed(f"loss={loss} seed={seed}")[0] / "o", tree / "o", dirs_exist_ok=True)
        while True:
            folder = self.copied(tree)
            file = self.rng.choice(sorted(f for f in folder.rglob("*.*") if f.name in FILES and f.suffix != ".pt"))
            name, damage = self.rng.choice([*DAMAGE.items(), *[("a field", change_field)] * 20])
            told = damage(file, file, self.rng)
            ended = self.fork(folder, lambda: report.main(["o", "--out", "r", "--format", "md,csv"]) or 0)
            where = f"{file.name} {name}{f' {told}' if told else ''}"
            if ended.code is None or ended.traceback:
                yield f"{where}: {'hangs' if ended.code is None else last_line(ended)}"
            else:
                yield "" if ended.code == 0 or ended.one_line else f"{where}: {ended.err[:80]!r}"

    def goes_on(self, folder: Path, options: str) -> str:
        ended = self.run(folder, options)
        if ended.code != 0:
            return f"{options}: does not go on: {last_line(ended)}"
        failure = self.difference(folder, options)
        return failure and f"{options}: {failure}"


# -- what a run has left ----------------------------------------------------------------------------------------------


def only(folder: Path) -> Path:
    """The directory of the only run below a folder."""
    (found,) = {f.parent for name in ("config.yaml", "run.json", "metrics.jsonl") for f in (folder / "o").rglob(name)}
    return found


def content(directory: Path, without: str = "") -> dict[str, Any]:
    """The results that must be equal in two runs of one command; one checkpoint can be left out."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    return {
        "status": json.loads((directory / "run.json").read_text())["status"],
        "rows": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
        "summary": {k: summary[k] for k in ("status", "epochs", "best", "last", "selected")},
        **{name: checkpoint.load(directory / name) for name in ("last.pt", "best.pt") if name != without},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def snapshot(directory: Path) -> dict[str, Any]:
    files = [f for f in directory.iterdir() if f.name != ".lock"]
    return {f.name: f.read_bytes() if f.is_file() else f.lstat().st_mode for f in files}


def stopped_well(ended: Ended, folder: Path, numbers: set[int]) -> str:
    """Whether signals ended a run as documented: exit code, status, no traceback."""
    codes = {signal.SIGINT: (130, -2), signal.SIGTERM: (143, -15), signal.SIGKILL: (-9,)}
    allowed = {0, *(code for number in numbers for code in codes[number])}
    if ended.code not in allowed or ended.traceback:
        return f"signals {sorted(numbers)}: code {ended.code}, {last_line(ended)}"
    files = list((folder / "o").rglob("run.json")) if (folder / "o").exists() else []
    status = json.loads(files[0].read_text())["status"] if files else "interrupted"
    if ended.code in (130, 143) and status not in ("interrupted", "finished"):
        return f"signals {sorted(numbers)}: status {status}"
    return ""


def last_line(ended: Ended) -> str:
    return ((ended.err or ended.out).strip().splitlines() or ["silence"])[-1][:120]


# -- options ----------------------------------------------------------------------------------------------------------

VALUES = ("0", "-1", "1", "2", "3.5", "1e-9", "1e30", "nan", "inf", "-inf", "null", "true", "''", "x", "'a b'", "[]",
          "[1]", "[a,b]", "{}", "{a: 1}", "${nope}", "${seed}", "99999999999999999999", "1,2", "\"'\"", "é", "0x10",
          "1_000", "../../etc", "~", "auto", "none", "digit", "'$(touch executed)'", "x" * 300)  # fmt: skip


def config_keys() -> dict[str, list[str]]:
    """The keys that each option of each config group sets: {"loss=dwa": ["loss.temperature", …], …}."""
    found = {"": ["seed", "output_root", *GROUPS]}
    for group in GROUPS:
        for file in sorted((CONF / group).glob("*.yaml")):
            keys = [key for key in yaml.safe_load(file.read_text()) or {} if re.fullmatch(r"\w+", str(key))]
            if group != "experiment" and keys:
                found[f"{group}={file.stem}"] = [f"{group}.{key}" for key in keys]
    return found


def try_option(group: str, option: str) -> str:
    """Compose, check and build one config. Empty if it works or is refused in one line; otherwise the fault."""
    # A group's option before its key; where the key decides the data or network, the small one stands before that.
    words = [w for w in SMALL if not group or not w.startswith(group.partition("=")[0])]
    try:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = compose("config", [*words, *([group] if group else []), option])
                plain = OmegaConf.to_container(config, resolve=True)
        except Exception as error:
            raise translate(error) from error
        plain.pop("hydra", None)
        check(plain)
        identify(plain, {g: str(g) for g in GROUPS})
        benchmark, learner = assemble(plain)
        if "cifar" not in type(benchmark).__name__.lower():
            open_batches(benchmark, learner)
    except UserError as error:
        return "" if "\n" not in str(error) else f"several lines: {str(error)[:60]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]!r}"
    return "it executed something" if Path("executed").exists() else ""


# -- the table --------------------------------------------------------------------------------------------------------

CAMPAIGNS = ("kills", "signals", "files", "disk", "options", "report")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("campaigns", nargs="*", default=CAMPAIGNS, help=f"of {', '.join(CAMPAIGNS)}; default all")
    parser.add_argument("--cases", type=int, default=20, help="of each campaign; 25 times as many options")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most for each campaign")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    if unknown := set(words.campaigns) - set(CAMPAIGNS):
        parser.error(f"{', '.join(unknown)}: must be of {', '.join(CAMPAIGNS)}")
    torch.set_num_threads(1)
    rows, failures = [], 0
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), random.Random(words.seed))
        for name in words.campaigns:
            since, wanted = time.monotonic(), words.cases * (25 if name == "options" else 1)
            outcomes: list[str] = []
            for outcome in getattr(faults, name)():
                outcomes.append(outcome)
                if len(outcomes) >= wanted or time.monotonic() - since > words.seconds:
                    break
            failed = Counter(o for o in outcomes if o)
            failures += failed.total()
            what = "; ".join(f"{text}{f' ({n} times)' if n > 1 else ''}" for text, n in failed.items())
            rows.append([name, str(len(outcomes)), str(len(outcomes) - failed.total()), str(failed.total()), what])
            print(" | ".join(rows[-1]), flush=True)
    print(f"\n{table(['campaign', 'cases', 'survived', 'failed', 'what failed'], rows)}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
