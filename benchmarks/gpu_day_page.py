"""The page of a GPU day: Markdown from gpu_day.json, also if phases failed or were cut off."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_day import Phase

ASSUMED = 40.0  # epochs per minute of all runs together, if no earlier day has measured it


def render(day: dict[str, Any]) -> str:
    """The whole page.

    Args:
        day: the content of gpu_day.json; a phase may have no result yet.
    """
    parts = [_head(day), _phases(day["phases"])]
    for name, phase in day["phases"].items():
        found = phase["found"]
        if found and name == "tests":
            parts.append(_tests(found))
        elif found and name.startswith("steps"):
            parts.append(_steps(name.partition(" ")[2], found))
        elif found and name == "at-once":
            parts.append(_at_once(found))
        elif found and name == "runs":
            parts.append(_runs(found))
    return "\n\n".join([*parts, _missing(day["phases"])]) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


def _number(value: float | None, pattern: str = ",.0f") -> str:
    return "–" if value is None else format(value, pattern)


def _ratio(ratio: dict[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})"


def _head(day: dict[str, Any]) -> str:
    device, versions = day["device"], day["versions"]
    rows = [
        ["command", f"`{day['command']}`"],
        ["commit", day["commit"] or "unknown"],
        ["began", day["began"]],
        ["wall time", f"{day['seconds']:.0f} s of {60 * day['minutes']:.0f} s"],
        ["device", f"{device['name'] or device['asked']}, {device['memory'] or 'memory unknown'}"],
        ["CPU cores", device["cores"]],
        ["driver", device["driver"] or "–"],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
    ]
    return "# GPU day\n\n" + _table(["", ""], rows)


def _phases(phases: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, p["status"], f"{p['seconds']:.0f} s", f"{p['budget']:.0f} s", f"`{p['command'] or '–'}`"]
        for name, p in phases.items()
    ]
    return "## Phases\n\n" + _table(["phase", "status", "took", "at most", "command"], rows)


def _tests(tests: Sequence[dict[str, Any]]) -> str:
    counts = Counter(test["outcome"] for test in tests)
    text = "## Tests\n\n" + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
    text += f", {sum(test['seconds'] for test in tests):.0f} s in tests."
    rest = [[t["test"], t["outcome"], t["reason"]] for t in tests if t["outcome"] == "failed"]
    rest += [["", "skipped", reason] for reason in sorted({t["reason"] for t in tests if t["outcome"] == "skipped"})]
    return text + ("\n\n" + _table(["test", "outcome", "reason"], rest) if rest else "")


def _steps(arch: str, found: dict[str, Any]) -> str:
    rows = [
        [
            row["loop"],
            _number(row["step_ms"], ".1f"),
            _number(row["images_per_second"]),
            _ratio(row["x_plain"]),
            _ratio(row["x_in_memory"]),
            _number(row["memory_mib"]),
            row["rounds"],
        ]
        for row in found["rows"]
    ]
    header = ["loop", "ms a step", "images/s", "speed x plain", "speed x in memory", "MiB", "rounds"]
    text = f"## Steps: {arch}\n\n{found['about']}. Ratios are of the same round: median (lowest–highest), above 1 is "
    text += "faster. Plain: the tutorial's loop with two loader workers. In memory: a plain loop of the same precision "
    text += "and layout. Its images lie on the device and are not augmented. MiB: the most GPU memory that an epoch "
    return text + "needed, without weights and images.\n\n" + _table(header, rows)


def _at_once(found: dict[str, Any]) -> str:
    rows = [[count, _number(speed)] for count, speed in found["images_per_second"].items()]
    text = f"## Trainings at a time\n\n{found['about']}. Choice: {found['choice']}.\n\n"
    return text + _table(["at once", "images/s, sum"], rows)


def _runs(found: dict[str, Any]) -> str:
    rows = []
    for run in found["runs"]:
        accuracies = [f"{run['last'][key]:.2f} / {run['best'][key]:.2f}" for key in run["last"]]
        pace = [_number(run["seconds_per_epoch"], ".2f"), _number(run["images_per_second"])]
        reached = f"{run['reached']} ({run['before']} before) of {run['epochs']}"
        memory = _number(run["peak_memory_gib"], ".2f")
        rows.append([run["loss"], run["seed"], run["status"], reached, accuracies, *pace, memory])
    keys = max((list(run["last"]) for run in found["runs"]), key=len, default=[])
    names = [f"{key.removeprefix('test/').removesuffix('_accuracy')} last / best" for key in keys]
    rows = [[*row[:4], *(row[4] or ["–"] * len(keys)), *row[5:]] for row in rows]
    text = f"## Runs\n\n`{' '.join(found['words'])}`, {found['at_once']} at a time, {found['seconds']:.0f} s: "
    text += f"{_trained(found)} epochs, {_pace(found):.1f} a minute. Test accuracies in %.\n\n"
    header = ["loss", "seed", "status", "epochs", *names, "s an epoch", "images/s", "GiB"]
    return text + _table(header, rows)


def _trained(found: dict[str, Any]) -> int:
    """Number of epochs that this day has trained, over all runs."""
    return sum(run["reached"] - run["before"] for run in found["runs"])


def _pace(found: dict[str, Any]) -> float:
    """Epochs per minute of all runs together."""
    return 60 * _trained(found) / found["seconds"] if found["seconds"] else 0.0


def _left(found: dict[str, Any]) -> int:
    """Number of epochs that are still to be trained."""
    return sum(run["epochs"] - run["reached"] for run in found["runs"])


def _missing(phases: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, phase in phases.items():
        if phase["status"] in ("failed", "cut", "not reached"):
            lines.append(f"- {name}: {phase['status']}{': ' + phase['error'] if phase['error'] else ''}")
        for row in (phase["found"] or {}).get("rows", []) if name.startswith("steps") else []:
            if not row["rounds"]:
                lines.append(f"- {name}: no round of “{row['loop']}”")
    for outcome, count in sorted(Counter(t["outcome"] for t in phases.get("tests", {}).get("found") or []).items()):
        if outcome != "passed":
            lines.append(f"- tests: {count} {outcome}")
    runs = phases.get("runs", {}).get("found")
    if runs:
        lines += [f"- {r['loss']} seed {r['seed']}: {r['error']}" for r in runs["runs"] if r["error"]]
        if left := _left(runs):
            pace = _pace(runs)
            more = f", about {left / pace:.0f} minutes at this pace" if pace else ""
            open_runs = sum(r["reached"] < r["epochs"] for r in runs["runs"])
            lines.append(f"- {open_runs} of {len(runs['runs'])} runs are not finished: {left:,} epochs are left{more}")
    return "## What did not fit\n\n" + ("\n".join(lines) or "Everything fitted.")


def plan(options: argparse.Namespace, phases: Sequence[Phase], before: dict[str, Any] | None) -> str:
    """What a day would do, in lines for a terminal.

    Args:
        options: of the command line.
        phases: of the day; nothing has been started.
        before: gpu_day.json of an earlier day in the same folder.
    """
    total = 60 * options.minutes
    lines = [f"{options.minutes:g} minutes on {options.device}, results in {options.out}"]
    rest = total
    for phase in phases:
        if phase.status == "skipped":
            lines.append(f"  {phase.name}: left out")
        elif phase.share < 1:
            rest -= phase.share * total
            lines.append(f"  {phase.name}: {phase.share * total:.0f} s at most")
        else:
            lines.append(f"  {phase.name}: the rest, {max(rest, 0):.0f} s at least")
    if "runs" in options.phases:
        lines += _plan_runs(options, max(rest, 0), ((before or {}).get("phases", {}).get("runs") or {}).get("found"))
    return "\n".join(lines)


def _plan_runs(options: argparse.Namespace, seconds: float, found: dict[str, Any] | None) -> list[str]:
    losses, seeds = ", ".join(options.losses), ", ".join(map(str, options.seeds))
    number = len(options.losses) * len(options.seeds)
    lines = [f"    {number} runs: {losses}; seeds {seeds}; {options.at_once or 'a measured number'} at a time"]
    pace, source = ASSUMED, "assumed"
    if found and _pace(found):
        pace, source = _pace(found), "measured on the day before"
    lines.append(f"    about {pace * seconds / 60:,.0f} epochs at {pace:.0f} a minute ({source})")
    if found:
        lines.append(f"    {_left(found):,} epochs were left, about {_left(found) / pace:.0f} minutes")
    return lines
