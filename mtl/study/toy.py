"""The two-dimensional toy problem of CAGrad, Nash-MTL, FAMO and FairGrad: where methods end, and after how many steps.

    python -m mtl.study.toy trajectories                      every default method in both settings: figures, CSV, table
    python -m mtl.study.toy trajectories cagrad:c=0.2 gradvac            any methods of conf/loss, with overrides
    python -m mtl.study.toy steps                             steps until the average minimum, beside the published ones

Two losses of x in R² (Liu et al., "Conflict-Averse Gradient Descent", NeurIPS 2021, appendix), with s = (1, −1) and
u_i = −x₁/2 + s_i (tanh x₂ − 7/2):

    L_i = c₊ (log max(|u_i|, 5e-6) + 6) + c₋ ([(x₁ − 7 s_i)² + 0.1 (x₂ + 8)²] / 10 − 20),   c± = max(± tanh(x₂/2), 0),

narrow valleys above x₂ = 0 and two bowls below. Pareto set: x₂ = −8.3552, |x₁| ≤ 7; least average loss −15.09 at its
middle. Nash-MTL (Navon et al., ICML 2022) multiplies L_1 by 0.1, which moves that minimum to x₁ = −5.7.

`steps` repeats tables 1 and A3 of Elich et al., "Examining Common Paradigms in Multi-Task Learning", 2024: the steps
until the average loss is below −15, from the worst of CAGrad's three starts, with the update of CAGrad's own code: the
mean gradient, half of PCGrad's sum, CAGrad's direction / (1 + c). Their stopping rule is not stated; this one gives
their numbers where rounding does not decide them. In a valley it does: steps across it are chaotic, so that the
same run in float32 (as theirs) and in float64 are shown side by side.

Gradients are analytic, in float64. Loss weightings see the losses above their lower bounds, −21 and −21 · scale, as in
FAMO's code: logarithms and ratios of negative losses mean nothing. Methods that learn from epochs have one in
100 steps.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from mtl.config.errors import ConfigError, UserError, suggest
from mtl.config.identity import CONF
from mtl.config.schema import build, check
from mtl.losses.base import GramianWeighting, LossWeighting, Statistics, Strategy
from mtl.tracking.console import duration, table

FLOOR, FRONT, LOWER, EPOCH = 5e-6, -8.3552, -21.0, 100
SIGNS = np.array([1.0, -1.0])


@dataclass(frozen=True)
class Setting:
    """Where a paper starts, and for how long it runs (Adam, learning rate 1e-3)."""

    starts: tuple[tuple[float, float], ...]
    scale: float  # of the first loss
    steps: int

    @property
    def middle(self) -> float:
        """x₁ of the least average loss."""
        return 7 * (self.scale - 1) / (self.scale + 1)


SETTINGS = {
    "cagrad": Setting(((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)), 1.0, 100_000),
    "nash": Setting(((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)), 0.1, 35_000),
}
METHODS = ("equal", "uncertainty:form=regression,lr=0.025", "famo:gamma=0", "graddrop", "pcgrad", "cagrad:c=0.5",
           "mgda", "imtl_g", "nash_mtl", "fairgrad", "aligned_mtl", "upgrad")  # fmt: skip

# Elich et al., table A3; None: not reached. The factor makes the step that of CAGrad's code.
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


def problem(x: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Losses (…, 2) and Jacobians (…, 2 tasks, 2) at the points x (…, 2), in float64.

    At x₂ = 0, where both gates have a kink, both count with their slope from inside, as the derivative of torch.clamp
    did when the papers were written; with that of torch 2.15, 0, every method stays at Nash-MTL's start (0, 0).
    """
    x1, x2 = np.asarray(x, dtype=np.float64)[..., :1], np.asarray(x, dtype=np.float64)[..., 1:]
    tanh, half = np.tanh(x2), np.tanh(x2 / 2)
    up, down, slope = np.maximum(half, 0), np.maximum(-half, 0), (1 - half * half) / 2
    u = SIGNS * (tanh - 3.5) - x1 / 2
    held = np.abs(u) <= FLOOR
    valley = np.log(np.where(held, FLOOR, np.abs(u))) + 6
    du = np.where(held, 0.0, 1 / np.where(held, 1.0, u))
    gap = x1 - 7 * SIGNS
    bowl = (gap * gap + 0.1 * (x2 + 8) ** 2) / 10 - 20
    losses = up * valley + down * bowl
    along = down * gap / 5 - up * du / 2
    across = up * du * SIGNS * (1 - tanh * tanh) + down * (x2 + 8) / 50 + slope * (valley * (x2 >= 0) - bowl * (x2 <= 0))
    factors = np.array([scale, 1.0])
    return losses * factors, np.stack([along, across], axis=-1) * factors[:, None]


class _Losses(torch.autograd.Function):
    """`problem` for the few methods that evaluate the losses elsewhere."""

    @staticmethod
    def forward(ctx, point, scale):
        losses, jacobian = (torch.from_numpy(a) for a in problem(point.numpy(), scale))
        ctx.save_for_backward(jacobian)
        return losses

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


def named(spec: str, tasks: int | Sequence[str] = 2) -> Strategy:
    """The strategy that a word like "cagrad" or "fairgrad:alpha=1,max_norm=null" names: conf/loss/*.yaml and overrides.

    Raises:
        ConfigError: no such method, or an argument is wrong.
    """
    name, _, overrides = spec.partition(":")
    files = {file.stem: file for file in (CONF / "loss").glob("*.yaml")}
    if name not in files:
        raise ConfigError(f"{name}: no such method; one of {', '.join(sorted(files))}{suggest(name, files)}")
    changes = OmegaConf.create("{" + re.sub(r"(\w+)=", r"\1: ", overrides) + "}")
    node = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(files[name]), changes))
    check(node, name, supplied=("tasks",))
    return build(node, name, tasks=tasks)


class Guide:
    """A strategy on one trajectory: its direction at each point, from losses and Jacobian directly.

    Args:
        spec: as in `named`.
        scale: of the first loss.
        lr, adam: of the optimizer, which the strategy's own parameters follow as well.
        steps: of the whole run.
    """

    def __init__(self, spec: str, scale: float, lr: float, adam: bool, steps: int):
        self.strategy, self.scale, self.lr, self.epochs = named(spec), scale, lr, 1 + steps // EPOCH
        if self.strategy.gradients == "features" or self._defines("regulariser"):
            raise ConfigError(f"{spec}: needs the features of a network, and the toy has none")
        self.lower = torch.tensor([LOWER * scale, LOWER], dtype=torch.float64)
        self.parameters = list(self.strategy.parameters())
        if self.parameters:
            rate = lr if self.strategy.lr is None else self.strategy.lr
            self.own = (torch.optim.Adam if adam else torch.optim.SGD)(self.parameters, lr=rate)
        self.steps, self.sums = 0, torch.zeros(2, dtype=torch.float64)
        self.special = [m for m in ("after_step", "look_ahead", "epoch_end") if self._defines(m)]

    def _defines(self, method: str) -> bool:
        default = getattr(LossWeighting, method)
        return getattr(type(self.strategy), method, default) is not default

    def __call__(self, point: np.ndarray, losses: np.ndarray, jacobian: np.ndarray) -> np.ndarray:
        """(2,) the direction to move against at `point`, with `losses` (2,) and `jacobian` (2, 2) there."""
        strategy, J = self.strategy, torch.from_numpy(jacobian)
        values = torch.from_numpy(losses) - self.lower
        if "after_step" in self.special and self.steps:
            strategy.after_step(values)
        if self.steps % EPOCH == 0:
            if "epoch_end" in self.special and self.steps:
                mean = self.sums / EPOCH
                strategy.epoch_end(Statistics(mean, mean, torch.zeros(2, dtype=torch.bool)))
            strategy.epoch_start(self.steps // EPOCH, self.epochs, self.steps)
            self.sums.zero_()
        self.sums += values
        self.steps += 1
        if "look_ahead" in self.special:
            x = torch.nn.Parameter(torch.tensor(point, dtype=torch.float64))
            strategy.look_ahead(lambda half: _Losses.apply(x, self.scale) - self.lower, [x], self.lr)
        if isinstance(strategy, LossWeighting):
            values.requires_grad_()
            weights, *gradients = torch.autograd.grad(strategy(values), [values, *self.parameters])
            if self.parameters:
                for p, gradient in zip(self.parameters, gradients, strict=True):
                    p.grad = gradient
                self.own.step()
            return (weights @ J).numpy()
        with torch.inference_mode():
            if isinstance(strategy, GramianWeighting):
                direction = strategy.weights(J @ J.T, None, values).to(J) @ J
            else:
                direction = strategy.aggregate(J, None, values)
                direction = direction[0] if isinstance(direction, tuple) else direction
            if strategy.max_norm is not None:
                direction = direction * (strategy.max_norm / direction.norm().clamp(min=1e-300)).clamp(max=1.0)
            return direction.numpy()


@dataclass
class Descent:
    """What became of each start: where it stood last, after how many steps, and why it went no further.

    why: "goal", "settled" (it rests on the Pareto set), "cycle" (gradient descent came back to a point it had been at,
        and so will for ever), "diverged", or "cap".
    path: (K, S, 2), every k-th point.
    """

    x: np.ndarray
    steps: list[int]
    why: list[str]
    path: np.ndarray


def descend(
    spec: str,
    setting: Setting,
    steps: int,
    lr: float = 1e-3,
    adam: bool = True,
    factor: float = 1.0,
    goal: Callable[[np.ndarray], bool] | None = None,
    dtype: type = np.float64,
    every: int = 0,
) -> Descent:
    """Follow a strategy from all starts of a setting.

    Args:
        spec: as in `named`.
        setting: starts and scale.
        steps: at most.
        lr, adam: Adam (its other values at their defaults) or plain gradient descent.
        factor: on every direction.
        goal: of the losses (2,): where it is true, a trajectory ends. None: it ends where it rests on the Pareto set.
        dtype: of the parameters and the optimizer's state.
        every: how often the path is noted; 0: never.
    """
    x = np.array(setting.starts, dtype)
    guides = [Guide(spec, setting.scale, lr, adam, steps) for _ in x]
    # A method without state is at the mercy of x alone, so that gradient descent can be caught in a cycle (Brent).
    stateless = not adam and not any([*guides[0].parameters, *guides[0].strategy.buffers()])
    m, v, seen, lowest, highest, path = np.zeros_like(x), np.zeros_like(x), x + np.nan, x, x, []
    ended, why, live = [steps] * len(x), ["cap"] * len(x), list(range(len(x)))
    for t in range(steps + 1):
        losses, jacobian = problem(x, setting.scale)
        if every and t % every == 0:
            path.append(x.copy())
        resting = np.zeros(len(x), dtype=bool)
        if goal is None:
            lowest, highest = np.minimum(lowest, x), np.maximum(highest, x)
            if t % 5000 == 0:
                resting = on_front(x) & (highest - lowest < 0.02).all(1)
                lowest, highest = x, x
        cycling = (x == seen).all(1) if stateless else resting & False
        for s in list(live):
            reason = "goal" if goal is not None and goal(losses[s]) else "settled" if resting[s] else None
            reason = reason or ("cycle" if cycling[s] else None if np.isfinite(x[s]).all() else "diverged")
            if reason:
                ended[s], why[s] = t, reason
                live.remove(s)
        if t == steps or not live:
            break
        if t & (t - 1) == 0:
            seen = x.copy()
        g = np.zeros_like(x)
        for s in live:
            g[s] = factor * guides[s](x[s], losses[s], jacobian[s])
        move = lr * g
        if adam:
            m, v = m + dtype(0.1) * (g - m), dtype(0.999) * v + dtype(0.001) * g * g
            first, second = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
            move = dtype(lr / first) * (m / (np.sqrt(v) / dtype(np.sqrt(second)) + dtype(1e-8)))
        x = x.copy()
        x[live] -= move[live]
    return Descent(x, ended, why, np.array(path))


def on_front(x: np.ndarray) -> np.ndarray:
    """Which of the points (…, 2) lie on the Pareto set, within 0.3."""
    return (np.abs(x[..., 1] - FRONT) < 0.3) & (np.abs(x[..., 0]) < 7.3)


def trajectories(specs: Sequence[str], names: Sequence[str], steps: int | None, out: Path) -> str:
    """Run the methods in the named settings; write trajectories.csv and a figure for each; return the table."""
    rows, summary = [], {spec: [spec] for spec in specs}
    for name in names:
        setting, runs = SETTINGS[name], {}
        for spec in specs:
            since = time.perf_counter()
            length = steps or setting.steps
            runs[spec] = run = descend(spec, setting, length, every=max(1, length // 1000))
            front = on_front(run.x)
            middle = front & (np.abs(run.x[:, 0] - setting.middle) < 1)
            ends = problem(run.x, setting.scale)[0]
            for s, start in enumerate(setting.starts):
                where = [*start, run.steps[s], run.why[s], *run.x[s].round(4), *ends[s].round(4)]
                rows.append([name, spec, *where, int(front[s]), int(middle[s])])
            summary[spec] += [f"{front.sum()} of {len(front)}", f"{middle.sum()} of {len(front)}"]
            summary[spec] += [" ".join(f"{a:.1f}" if on else "–" for a, on in zip(run.x[:, 0], front, strict=True))]
            print(f"{name} {spec}: {summary[spec][-3]}, {duration(time.perf_counter() - since)}", flush=True)
        draw(runs, setting, out / f"{name}.png")
        if name == "nash":
            draw(runs, setting, out / f"{name}-losses.png", losses=True)
    header = "setting method start_x1 start_x2 steps why x1 x2 loss1 loss2 on_pareto_set at_average_minimum"
    _write(out / "trajectories.csv", header.split(), rows)
    columns = [f"{name}: {what}" for name in names for what in ("Pareto set", "average minimum", "x₁ there")]
    return _markdown(["method", *columns], list(summary.values()))


def draw(runs: dict[str, Descent], setting: Setting, file: Path, losses: bool = False) -> None:
    """One panel a method: its trajectories from all starts, over the average loss or, as in Nash-MTL, of the losses."""
    from matplotlib import pyplot as plt  # late: takes a second

    plt.switch_backend("Agg")
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 2.6 * lines + 0.5), layout="constrained",
                                sharex=True, sharey=True, squeeze=False)  # fmt: skip
    ticks = np.linspace(-11, 11, 400)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1)
    average = problem(grid, setting.scale)[0].mean(-1)
    line = np.stack([np.linspace(-7, 7, 200), np.full(200, FRONT)], axis=-1)
    place = (lambda x: problem(x, setting.scale)[0]) if losses else np.asarray
    best = place(np.array([setting.middle, FRONT]))
    for axis in axes.flat[len(runs) :]:
        axis.set_axis_off()
    for axis, (spec, run) in zip(axes.flat, runs.items(), strict=False):
        if not losses:
            axis.contour(ticks, ticks, average, levels=14, colors="0.75", linewidths=0.6, linestyles="solid", zorder=0)
            axis.set(xlim=(-11, 11), ylim=(-11, 11))
        axis.plot(*place(line).T, color="0.45", linewidth=5, solid_capstyle="butt", zorder=1)
        for s, start in enumerate(setting.starts):
            points = place(run.path[:, s])
            shades = axis.scatter(*points.T, c=np.arange(len(points)) / len(points), cmap="plasma", vmin=0, vmax=1.05,
                                  s=3, linewidths=0, zorder=2)  # fmt: skip
            axis.plot(*place(np.array(start)), "ko", markersize=5, zorder=3)
            axis.plot(*place(run.x[s]), "X", color="tab:green", markeredgecolor="white", markersize=8, zorder=4)
        axis.plot(*best, "*", color="black", markeredgecolor="white", markersize=11, zorder=3)
        axis.set_title(spec.partition(":")[0] + (f" ({spec.partition(':')[2]})" if ":" in spec else ""), fontsize=9)
    names = ("$L_1$", "$L_2$") if losses else ("$x_1$", "$x_2$")
    figure.supxlabel(names[0], fontsize=10)
    figure.supylabel(names[1], fontsize=10)
    bar = figure.colorbar(shades, ax=axes, fraction=0.02, aspect=40)
    bar.set_label("share of the run; ● start, ✖ end, ★ least average loss, grey: Pareto set", fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def steps_until_minimum(names: Sequence[str], rates: Sequence[float], cap: int, out: Path) -> str:
    """The step counts of Elich et al. for gradient descent and Adam; write steps.csv, steps.png; return the table."""
    rows, cells = [], {}
    for optimizer in ("gd", "adam"):
        for name in names:
            spec, factor = COMPARED[name]
            for lr in rates:
                published = PUBLISHED[optimizer, name][RATES.index(lr)]
                for dtype in (np.float32, np.float64):
                    run = descend(spec, SETTINGS["cagrad"], cap, lr, optimizer == "adam", factor, _low, dtype)
                    each = [n if why == "goal" else None for n, why in zip(run.steps, run.why, strict=True)]
                    worst = None if None in each else max(each)
                    cells[optimizer, name, lr, dtype] = worst
                    texts = [n if why == "goal" else why for n, why in zip(run.steps, run.why, strict=True)]
                    rows.append([optimizer, name, lr, dtype.__name__, published, worst, *texts])
                print(optimizer, name, lr, f"published {published}:", *rows[-2][5:], "|", *rows[-1][5:], flush=True)
    _write(out / "steps.csv", "optimizer method lr precision published steps start1 start2 start3".split(), rows)
    lines = []
    for optimizer, name in dict.fromkeys((o, n) for o, n, *_ in cells):
        measured = [[cells[optimizer, name, lr, dtype] for lr in rates] for dtype in (np.float32, np.float64)]
        kinds = ("published", [PUBLISHED[optimizer, name][RATES.index(lr)] for lr in rates]), *zip(
            ("float32", "float64"), measured, strict=True
        )
        for kind, counts in kinds:
            lines.append([optimizer.upper() if optimizer == "gd" else "Adam", name, kind])
            lines[-1] += ["–" if n is None else f"{n:,}" for n in counts]
    return _markdown(["optimizer", "method", "learning rate", *map(str, rates)], lines)


def _low(losses: np.ndarray) -> bool:
    return losses.mean() < -15


def _write(file: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def _markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mtl.study.toy", description=__doc__.partition("\n\n")[0])
    parser.add_argument("study", choices=("trajectories", "steps"))
    parser.add_argument("methods", nargs="*", help="NAME[:key=value,...] of conf/loss; steps: EW, PCGrad, CAGrad")
    parser.add_argument("--setting", choices=SETTINGS, help="trajectories of one setting; default: both")
    parser.add_argument("--lr", type=float, nargs="*", default=RATES, choices=RATES, help="of steps; default: all nine")
    parser.add_argument("--cap", type=int, help="most steps; default: the papers' in trajectories, 60000 in steps")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy"), help="folder; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    since = time.perf_counter()
    try:
        if options.study == "steps":
            names = options.methods or list(COMPARED)
            if wrong := [n for n in names if n not in COMPARED]:
                raise ConfigError(f"{wrong[0]}: steps were published for {', '.join(COMPARED)}{suggest(wrong[0], COMPARED)}")
            text = steps_until_minimum(names, options.lr, options.cap or 60_000, options.out)
        else:
            names = [options.setting] if options.setting else list(SETTINGS)
            for spec in options.methods:
                Guide(spec, 1.0, 1e-3, True, 1)  # refuse what is wrong before hours are spent
            text = trajectories(options.methods or METHODS, names, options.cap, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (options.out / f"{options.study}.md").write_text(text + "\n")
    print(f"{text}\n{duration(time.perf_counter() - since)}; written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
