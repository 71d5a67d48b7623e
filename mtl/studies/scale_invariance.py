"""Which methods' updates stay the same if the losses' scales change? Experiment A2 of "Examining Common Paradigms".

    python -m mtl.studies.scale_invariance                                      the five pairs below
    python -m mtl.studies.scale_invariance nash_mtl/sgd imtl_l:lr=0.1/adam      any methods of conf/loss, with overrides
    python -m mtl.studies.scale_invariance mine/sgd --config-dir my_configs     your own: my_configs/loss/mine.yaml

Elich et al., "Examining Common Paradigms in Multi-Task Learning", 2024, appendix A2. There are two regression tasks
with L1 losses. Their target is the scalar input itself. The backbone has two LeakyReLU layers of 20 units, each head
has two layers. Each method is trained twice for 100 epochs from the same initial parameters: with the losses as they
are, and with the first loss times 10 and the second times 0.1. All of this is done with a fixed backbone and with one
that learns. The paper finds these parts invariant:

    EW, SGD             nothing (first updates of the heads differ by the factors 10 and 0.1)
    EW, Adam, signSGD   the heads, if the backbone is fixed
    UW-O, SGD           everything
    EW, Adam per task   everything (`mtl.optim.taskwise.AdaTask`)

The paper does not state some settings. We chose 256 inputs, uniform on (0, 1), one step per epoch on all of them, the
learning rates, and float64. We chose Adam's ε = 1e-30, so that invariant parts are equal up to rounding. With ε = 1e-8
(`--eps 1e-8`) they are not, because the smallest gradients of this network have that size.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mtl.engine.step import Losses, Step
from mtl.errors import ConfigError, UserError, suggest
from mtl.losses.base import Strategy
from mtl.losses.hooks import defines
from mtl.optim.signum import Signum
from mtl.optim.taskwise import AdaTask
from mtl.studies.toy_descent import folder_of_configs, named

WIDTH, SCALES, EPSILON = 20, (10.0, 0.1), 1e-30
PARTS = ("head 1", "head 2", "backbone")
PAIRS = ("equal/sgd", "equal/adam", "equal/signsgd", "uncertainty_optimal:form=laplace/sgd", "equal/adatask")
OPTIMIZERS = {
    "sgd": lambda groups, eps: torch.optim.SGD(groups, lr=0.005),
    "adam": lambda groups, eps: torch.optim.Adam(groups, lr=1e-3, eps=eps),
    "signsgd": lambda groups, eps: Signum(groups, lr=1e-4),
    "adatask": lambda groups, eps: AdaTask(groups, lr=1e-3, eps=eps),
}


class Network(nn.Module):
    """A shared backbone and two heads, for scalar inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(1, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU())
        self.heads = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, 1)) for _ in SCALES]
        )

    def parts(self) -> dict[str, nn.Module]:
        """The heads and the backbone, by the names in `PARTS`."""
        return dict(zip(PARTS, (*self.heads, self.backbone), strict=True))


@dataclass
class Record:
    """The numbers of one run per epoch: losses without their scales, and each part's gradient and update (P,)."""

    losses: list[list[float]] = field(default_factory=list)
    gradients: dict[str, list[Tensor]] = field(default_factory=lambda: {part: [] for part in PARTS})
    updates: dict[str, list[Tensor]] = field(default_factory=lambda: {part: [] for part in PARTS})


def run(
    pair: str, network: Network, data: Tensor, scales: Sequence[float], free: bool, epochs: int, eps=EPSILON,
    own: Path | None = None,
) -> Record:  # fmt: skip
    """Train a copy of `network`.

    Args:
        pair: LOSS/OPTIMIZER, LOSS as in `mtl.studies.toy_descent.named`.
        network: the initial parameters; it is not changed.
        data: (N, 1) inputs, which are also the targets.
        scales: factors of the two losses.
        free: whether the backbone learns.
        epochs: number of steps, because every step sees all data.
        eps: Adam's ε.
        own: a folder with more losses, own/loss/*.yaml.
    """
    strategy, network = _strategy(pair, own).double(), copy.deepcopy(network)
    rate = {} if free else {"lr": 0.0}  # a fixed backbone still has gradients, because the figure shows them
    strategy.prepare(WIDTH)
    groups = [{"params": list(network.heads.parameters())}, {"params": list(network.backbone.parameters()), **rate}]
    if own := list(strategy.parameters()):
        # As in the engine: the strategy's own parameters form a group with their own rate.
        groups.append({"params": own, **({} if strategy.lr is None else {"lr": strategy.lr})})
    optimizer = OPTIMIZERS[pair.rpartition("/")[2]](groups, eps)
    record = Record()

    def forward(part: slice) -> Losses:
        features = network.backbone(data[part])
        views = strategy.views(features)
        losses = [(head(z) - data[part]).abs().mean() for head, z in zip(network.heads, views, strict=True)]
        return Losses([scale * loss for scale, loss in zip(scales, losses, strict=True)], features)

    step = Step(strategy, optimizer, network.backbone, network.heads)
    for epoch in range(epochs):
        step.start_epoch(epoch, epochs, epoch)
        network.zero_grad()
        before = {part: _vector(module.parameters()) for part, module in network.parts().items()}
        info = step(forward, len(data))
        record.losses.append([x.item() / scale for x, scale in zip(info.passes[0].values, scales, strict=True)])
        for part, module in network.parts().items():
            record.gradients[part].append(_vector(p.grad for p in module.parameters()))
            record.updates[part].append(_vector(module.parameters()) - before[part])
        losses = torch.stack(info.passes[0].values).detach()
        # Methods such as AMTL need scores. This study has none but the losses.
        step.end_epoch(scores=losses, higher_is_better=torch.zeros(2, dtype=torch.bool))
    return record


def _strategy(pair: str, own: Path | None) -> Strategy:
    spec, _, optimizer = pair.rpartition("/")
    if not spec or optimizer not in OPTIMIZERS:
        known = f"{pair}: expected LOSS/OPTIMIZER with an optimizer of {', '.join(OPTIMIZERS)}"
        raise ConfigError(known + suggest(optimizer, OPTIMIZERS))
    strategy = named(spec, ("first", "second"), own)
    if strategy.samples > 1 or defines(strategy, "look_ahead"):
        raise ConfigError(f"{spec}: needs several batches per step; this study has one")
    return strategy


def _vector(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def difference(plain: Record, scaled: Record, part: str) -> float:
    """The largest ‖Δ' − Δ‖ / ‖Δ‖ over the epochs. Δ is the part's update, and Δ' its update with scaled losses."""
    pairs = zip(plain.updates[part], scaled.updates[part], strict=True)
    return max(((b - a).norm() / a.norm().clamp(min=1e-300)).item() for a, b in pairs)


def study(pairs: Sequence[str], epochs: int, eps: float, seed: int, out: Path, own: Path | None = None) -> str:
    """Run all pairs; write invariance.csv and two figures; return the table."""
    torch.manual_seed(seed)
    network, data = Network().double(), torch.rand(256, 1, dtype=torch.float64)
    rows, lines = [], {pair: [f"`{pair}`"] for pair in pairs}
    for free in (False, True):
        runs = {p: [run(p, network, data, s, free, epochs, eps, own) for s in ((1.0, 1.0), SCALES)] for p in pairs}
        backbone = "free" if free else "fixed"
        draw(runs, free, out / f"{backbone}.png")
        for pair, both in runs.items():
            lines[pair] += [f"{difference(*both, part=part):.1e}" for part in (PARTS if free else PARTS[:2])]
            for name, record in zip(("plain", "scaled"), both, strict=True):
                for epoch in range(epochs):
                    norms = [kind[p][epoch].norm() for p in PARTS for kind in (record.gradients, record.updates)]
                    numbers = [f"{float(x):.4g}" for x in (*record.losses[epoch], *norms)]
                    rows.append([backbone, pair, name, epoch + 1, *numbers])
    columns = [f"{kind} {part}" for part in PARTS for kind in ("gradient", "update")]
    with (out / "invariance.csv").open("w", newline="") as stream:
        header = ["backbone", "method", "losses", "epoch", "loss 1", "loss 2", *columns]
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    header = ["loss/optimizer", "fixed: head 1", "head 2", "free: head 1", "head 2", "backbone"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines.values()])


def draw(runs: dict[str, list[Record]], free: bool, file: Path) -> None:
    """Draw losses, gradients and updates over epochs. Each method has a column; dotted lines are the scaled losses."""
    from matplotlib import pyplot as plt  # late: takes a second
    from matplotlib.lines import Line2D

    plt.switch_backend("Agg")
    rows = ("losses, unscaled", "gradient magnitude", "update magnitude")
    figure, axes = plt.subplots(3, len(runs), figsize=(2.3 * len(runs) + 0.7, 6.4), sharex=True, sharey="row",
                                squeeze=False, layout="constrained")  # fmt: skip
    parts = PARTS if free else PARTS[:2]
    for column, (pair, both) in zip(axes.T, runs.items(), strict=True):
        for record, style, width in zip(both, ("-", ":"), (1.0, 2.2), strict=True):
            epochs = range(1, len(record.losses) + 1)
            for i, losses in enumerate(zip(*record.losses, strict=True)):
                column[0].plot(epochs, losses, style, color=f"C{i}", linewidth=width)
            for axis, vectors in zip(column[1:], (record.gradients, record.updates), strict=True):
                for i, part in enumerate(parts):
                    axis.plot(epochs, [v.norm() for v in vectors[part]], style, color=f"C{i}", linewidth=width)
        loss, _, optimizer = pair.rpartition("/")
        column[0].set_title(f"{loss.partition(':')[0]}\n{optimizer}", fontsize=9)
        column[2].set_xlabel("epoch")
        for axis in column:
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label)
    keys = [Line2D([], [], color=f"C{i}", label=part) for i, part in enumerate(parts)]
    keys += [Line2D([], [], color="0.3", linestyle="-", linewidth=1.0, label="losses × 1, × 1")]
    keys += [Line2D([], [], color="0.3", linestyle=":", linewidth=2.2, label="losses × 10, × 0.1")]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mtl.studies.scale_invariance", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("pairs", nargs="*", metavar="LOSS/OPTIMIZER", help=f"default: {' '.join(PAIRS)}")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--eps", type=float, default=EPSILON, help="Adam's ε; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/invariance"), help="folder; default: %(default)s")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own losses: DIR/loss/NAME.yaml")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        own = folder_of_configs(options.config_dir)
        options.out.mkdir(parents=True, exist_ok=True)
        text = study(options.pairs or PAIRS, options.epochs, options.eps, options.seed, options.out, own)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (options.out / "invariance.md").write_text(text + "\n")
    print(f"largest relative difference between the updates with and without scales\n{text}\nwritten to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
