"""Where do methods end on the toy problem of CAGrad, Nash-MTL, FAMO and FairGrad, and after how many steps?

    python -m mtl.studies.toy trajectories                    twelve methods, both settings: two figures, CSV, table
    python -m mtl.studies.toy trajectories cagrad:c=0.2 gradvac          any methods of conf/loss, with overrides
    python -m mtl.studies.toy trajectories mine --config-dir my_configs  your own: my_configs/loss/mine.yaml
    python -m mtl.studies.toy steps                           steps until the average minimum, beside the published ones

`trajectories` runs CAGrad's setting (three starts) and Nash-MTL's (five starts, first loss times 0.1). Both use Adam
with learning rate 1e-3 and the papers' number of steps. `mtl.studies.toy_descent` has the problem.

`steps` repeats tables 1 and A3 of Elich et al., "Examining Common Paradigms in Multi-Task Learning", 2024: the number
of steps until the average loss is below −15, from the worst of CAGrad's three starts. The updates are those of
CAGrad's own code: the mean gradient, half of PCGrad's sum, and CAGrad's direction / (1 + c).

The paper does not state its stopping rule. Ours gives the paper's numbers if rounding does not decide them. In the
valley rounding does decide, because steps across it are chaotic. So each run is made twice: with parameters and
optimizer in float32, as in the paper, and in float64 for a third as long.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mtl.errors import ConfigError, UserError, suggest
from mtl.studies.toy_descent import EPOCH, FRONT, Descent, Point, descend, folder_of_configs, on_front, problem
from mtl.tracking.console import duration


@dataclass(frozen=True)
class Setting:
    """The starts of a paper, and the length of its runs (Adam, learning rate 1e-3)."""

    starts: tuple[Point, ...]
    scale: float  # factor of the first loss
    steps: int

    @property
    def middle(self) -> float:
        """x₁ of the point with the least average loss."""
        return 7 * (self.scale - 1) / (self.scale + 1)


SETTINGS = {
    "cagrad": Setting(((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)), 1.0, 100_000),
    "nash": Setting(((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)), 0.1, 35_000),
}
METHODS = ("equal", "uncertainty:form=regression,lr=0.025", "famo:gamma=0", "graddrop", "pcgrad", "cagrad:c=0.5",
           "mgda", "imtl_g", "nash_mtl", "fairgrad", "aligned_mtl", "upgrad")  # fmt: skip

# Elich et al., table A3; None: not reached. The factor in COMPARED turns our update into the one of CAGrad's code.
RATES = (10.0, 5.0, 1.0, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001)
COMPARED = {"EW": ("equal", 1 / 2), "PCGrad": ("pcgrad", 1 / 2), "CAGrad": ("cagrad:c=0.5", 1 / 1.5)}
PUBLISHED = {
    ("gd", "EW"): (None, 103, None, None, None, None, None, None, None),
    ("gd", "PCGrad"): (None,) * 9,
    ("gd", "CAGrad"): (644, None, 213, 621, 8069, 5732, 20418, 34405, None),
    ("adam", "EW"): (26, 37, 22, 58, 709, 2135, 9015, 16005, None),
    ("adam", "PCGrad"): (25, 4960, 56, 15741, 34175, 41438, None, None, None),
    ("adam", "CAGrad"): (27, 30, 32, 106, 802, 7109, 11239, 14323, 57700),
}


def trajectories(
    specs: Sequence[str], names: Sequence[str], steps: int | None, out: Path, own: Path | None = None
) -> str:
    """Run the methods in the named settings; write trajectories.csv and a figure for each; return the table."""
    rows, summary = [], {spec: [f"`{spec}`"] for spec in specs}
    for name in names:
        setting, runs = SETTINGS[name], {}
        length = steps or setting.steps
        for spec in specs:
            since = time.perf_counter()
            every = max(1, length // 700)  # about 700 points per trajectory are enough for a figure
            runs[spec] = [descend(spec, s, length, setting.scale, every=every, own=own) for s in setting.starts]
            ends = [run.x[0] if on_front(*run.x) else None for run in runs[spec]]
            middle = [end is not None and abs(end - setting.middle) < 1 for end in ends]
            for start, run, end, best in zip(setting.starts, runs[spec], ends, middle, strict=True):
                numbers = [f"{a:.4f}" for a in (*run.x, *problem(*run.x, scale=setting.scale)[0])]
                rows.append([name, spec, *start, run.steps, run.why, *numbers, int(end is not None), int(best)])
            found = sum(end is not None for end in ends)
            # Adding 0.0 turns −0.0 into 0.0.
            where = " ".join("–" if end is None else f"{round(end, 1) + 0.0:.1f}" for end in ends)
            summary[spec] += [f"{found} of {len(ends)}", f"{sum(middle)} of {len(ends)}", where]
            print(f"{name} {spec}: {where}  ({duration(time.perf_counter() - since)})", flush=True)
        draw(runs, setting, out / f"{name}.png")
        if setting.scale != 1:
            draw(runs, setting, out / f"{name}-losses.png", losses=True)
    header = ["setting", "method", "start_x1", "start_x2", "steps", "why", "x1", "x2", "loss1", "loss2"]
    _write(out / "trajectories.csv", [*header, "on_pareto_set", "at_average_minimum"], rows)
    columns = [f"{name}: {what}" for name in names for what in ("Pareto set", "average minimum", "x₁ at the end")]
    return _markdown(["method", *columns], list(summary.values()))


def draw(runs: dict[str, list[Descent]], setting: Setting, file: Path, losses: bool = False) -> None:
    """Draw one panel per method: the trajectories in the plane, over the average loss.

    With `losses` the axes are the two losses instead, as in the Nash-MTL paper.
    """
    from matplotlib import pyplot as plt  # late: takes a second

    plt.switch_backend("Agg")
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.5 * columns + 0.8, 2.5 * lines + 0.6), sharex=True,
                                sharey=True, squeeze=False, layout="constrained")  # fmt: skip

    def place(points):
        return np.array([problem(*x, scale=setting.scale)[0] for x in points] if losses else points).T

    ticks = np.linspace(-11, 11, 200)
    average = [[sum(problem(a, b, setting.scale)[0]) / 2 for a in ticks] for b in ticks]
    front = place([(a, FRONT) for a in np.linspace(-7, 7, 200)])
    for axis in axes.flat[len(runs) :]:
        axis.set_axis_off()
    for axis, (spec, descents) in zip(axes.flat, runs.items(), strict=False):
        if not losses:
            axis.contour(ticks, ticks, average, levels=14, colors="0.75", linewidths=0.6, linestyles="solid", zorder=0)
            axis.set(xlim=(-11, 11), ylim=(-11, 11), aspect="equal")
        axis.plot(*front, color="0.5", linewidth=5, solid_capstyle="butt", zorder=1)
        for run in descents:
            shares = np.linspace(0, 1, len(run.path))
            shades = axis.scatter(
                *place(run.path), c=shares, cmap="plasma", vmin=0, vmax=1.15, s=4, linewidths=0, zorder=2
            )
        axis.plot(*place(setting.starts), "o", color="black", markersize=5, zorder=3)
        axis.plot(*place([run.x for run in descents]), "X", color="tab:green", markeredgecolor="white", markersize=8,
                  linestyle="none", zorder=5)  # fmt: skip
        axis.plot(
            *place([(setting.middle, FRONT)]), "*", color="black", markeredgecolor="white", markersize=12, zorder=4
        )
        axis.set_title(spec.replace(":", "\n"), fontsize=9)
    names = ("$L_1$", "$L_2$") if losses else ("$x_1$", "$x_2$")
    figure.supxlabel(f"{names[0]}      ● start   ✖ end   ★ least average loss   ▬ Pareto set", fontsize=10)
    figure.supylabel(names[1], fontsize=10)
    bar = figure.colorbar(shades, ax=axes, fraction=0.02, aspect=40)
    bar.ax.set_ylim(0, 1)
    bar.set_ticks([0, 1], labels=["first\nstep", "last"])
    figure.savefig(file, dpi=150)
    plt.close(figure)


def steps_until_minimum(names: Sequence[str], rates: Sequence[float], cap: int, out: Path) -> str:
    """Count the steps of Elich et al. for gradient descent and Adam; write steps.csv, steps.png; return the table."""
    rows, counts = [], {}
    for optimizer, name in [(o, n) for o in ("gd", "adam") for n in names]:
        for lr in rates:
            counts.setdefault((optimizer, name, "published"), []).append(PUBLISHED[optimizer, name][RATES.index(lr)])
            for kind, dtype, most in (("float32", np.float32, cap), ("float64", float, cap // 3)):
                worst, each = worst_start(name, lr, optimizer == "adam", dtype, most)
                counts.setdefault((optimizer, name, kind), []).append(worst)
                rows.append([optimizer, name, lr, kind, most, worst, *each])
                print(*rows[-1], flush=True)
    header = ["optimizer", "method", "lr", "precision", "cap", "steps", "start1", "start2", "start3"]
    _write(out / "steps.csv", header, rows)
    draw_steps(counts, rates, cap, out / "steps.png")
    lines = [[*key, *("–" if n is None else f"{n:,}" for n in numbers)] for key, numbers in counts.items()]
    return _markdown(["optimizer", "method", "", *(f"{lr:g}" for lr in rates)], lines)


def worst_start(name: str, lr: float, adam: bool, dtype: type, cap: int) -> tuple[int | None, list[int | str]]:
    """The number of steps until the average loss is below −15: from the worst of CAGrad's starts, and from each start.

    The first value is None if a start does not reach the goal. The third start is the hardest, so it comes first. After
    a start has failed, the others are skipped.
    """
    spec, factor = COMPARED[name]
    each: list[int | str] = ["skipped"] * 3
    for i in (2, 0, 1):
        run = descend(spec, SETTINGS["cagrad"].starts[i], cap, 1.0, lr, adam, factor, _low, dtype)
        each[i] = run.steps if run.why == "goal" else run.why
        if run.why != "goal":
            return None, each
    return max(each), each


def draw_steps(counts: dict[tuple[str, str, str], list[int | None]], rates, cap: int, file: Path) -> None:
    """Draw steps over learning rates: a panel per optimizer, a colour per method, a marker per source."""
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    marks = {"published": ("s", "none", ":"), "float32": ("o", None, "-"), "float64": ("x", None, "none")}
    for axis, optimizer in zip(axes, ("gd", "adam"), strict=True):
        for (which, name, source), numbers in counts.items():
            if which == optimizer:
                marker, face, style = marks[source]
                color = f"C{list(COMPARED).index(name)}"
                heights = [n or np.nan for n in numbers]
                axis.plot(rates, heights, marker=marker, markerfacecolor=face or color, linestyle=style, color=color,
                          linewidth=1.2, label=f"{name}, {source}")  # fmt: skip
        axis.axhline(cap, color="0.6", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=(min(rates) / 1.5, max(rates) * 1.5), ylim=(1.5, cap * 2),
                 xlabel="learning rate", title={"gd": "gradient descent", "adam": "Adam"}[optimizer])  # fmt: skip
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("steps until average loss < −15")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _low(losses: Point) -> bool:
    return losses[0] + losses[1] < -30


def _write(file: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def _markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mtl.studies.toy", description=__doc__.partition("\n\n")[0])
    parser.add_argument("study", choices=("trajectories", "steps"))
    parser.add_argument("methods", nargs="*", help="NAME[:key=value,...] of conf/loss; steps: EW, PCGrad, CAGrad")
    parser.add_argument("--setting", choices=SETTINGS, help="trajectories of one setting; default: both")
    parser.add_argument("--lr", type=float, nargs="*", default=RATES, choices=RATES, help="of steps; default: all nine")
    parser.add_argument("--cap", type=int, help="most steps; default: the papers' in trajectories, 60000 in steps")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy-study"), help="folder; default: %(default)s")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own losses: DIR/loss/NAME.yaml")
    options = parser.parse_args(arguments)
    # All tensors here are tiny; more threads would only cost time.
    torch.set_num_threads(1)
    since = time.perf_counter()
    try:
        own = folder_of_configs(options.config_dir)
        options.out.mkdir(parents=True, exist_ok=True)
        if options.study == "steps":
            names = options.methods or list(COMPARED)
            if wrong := [n for n in names if n not in COMPARED]:
                known = ", ".join(COMPARED)
                raise ConfigError(f"{wrong[0]}: steps were published for {known}{suggest(wrong[0], COMPARED)}")
            text = steps_until_minimum(names, options.lr, options.cap or 60_000, options.out)
        else:
            names = [options.setting] if options.setting else list(SETTINGS)
            for spec in options.methods:
                descend(spec, (1.0, -1.0), EPOCH + 1, own=own)  # a wrong method fails now, not after an hour
            text = trajectories(options.methods or METHODS, names, options.cap, options.out, own)
            text += "\n\n–: not on the Pareto set when the steps ended"
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (options.out / f"{options.study}.md").write_text(text + "\n")
    print(f"{text}\n{duration(time.perf_counter() - since)}; written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
