"""Annealed auxiliary tasks: one main task; the weight of the others falls during training and is multiplied by a gate.

The best published rows of the CIFAR-100 loss-combination benchmark are instances of one idea. With the progress t =
epoch / epochs,

    L = L_main + Σ_aux f(t) · gate · L_aux,      f(t) = end + (start − end) · shape((t − hold) / (1 − hold)).

f stays at `start` while t ≤ hold. Then it falls as a cosine (1 + cos πu)/2, a square (1 − u)² or an exponential
e^{−rate·u}. `uncertainty` gives every task a learned log-variance s, and the loss e^{−s} L + s. f then multiplies the
whole auxiliary term, or only its precision e^{−s}. The gates:

- calibrated: the ratio of two mean losses, main to auxiliary, over the first `calibration` batches. It is 1 until
  then.
- boosted: (1 + ¼ L_main/L_main(0)) · 2ρ_aux/(ρ_main + ρ_aux). ρ is L divided by its moving average (decay 0.95)
  before the step. The benchmark does not define the second factor; it only says that it comes from normalised losses.
  We chose a form whose mean is 1.
- guarded: exp(−3 max(0, ρ_main − 1, ρ_aux − 1)). This cuts the auxiliary weight when either loss has a spike. The
  main task's weight is 2 minus the mean auxiliary weight, or 2 if there is no auxiliary task.

The five published instances are conf/loss/annealed_*.yaml. The first task is the main one unless `main` names
another.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, masked

Shape = Literal["cosine", "square", "exponential"]
Gate = Literal["none", "calibrated", "boosted", "guarded"]
Uncertainty = Literal["none", "term", "precision"]


class Annealed(LossWeighting):
    """L = L_main + Σ_aux f(t) · gate · L_aux.

    Args:
        main: name of the main task; None is the first task.
        shape: the curve along which the auxiliary weight falls.
        start, end: the auxiliary weight at the beginning and at the end. The exponential does not quite reach `end`.
        hold: share of the training during which the weight stays at `start`.
        rate: decay rate of the exponential.
        gate: signal that multiplies the auxiliary weight.
        calibration: number of batches over which the calibrated gate takes its means.
        uncertainty: no log-variances (none); or learned ones, where f multiplies the whole auxiliary term (term) or
            only its precision (precision).
        lr, weight_decay: learning rate and weight decay of the log-variances; None uses the optimizer's.

    Raises:
        ValueError: there is no task named `main`, or a choice is not in its list.
    """

    uses_progress = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        main: str | None = None,
        shape: Shape = "cosine",
        start: Annotated[float, Ge(0)] = 1.0,
        end: Annotated[float, Ge(0)] = 0.1,
        hold: Annotated[float, Ge(0), Lt(1)] = 0.0,
        rate: Annotated[float, Gt(0)] = 3.0,
        gate: Gate = "none",
        calibration: Annotated[int, Ge(1)] = 50,
        uncertainty: Uncertainty = "none",
        lr: Annotated[float, Ge(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] | None = None,
    ):
        super().__init__(tasks)
        if main is not None and main not in self.names:
            raise ValueError(f"main: {main!r} is no task; the tasks are {', '.join(self.names)}")
        self.start, self.end, self.hold, self.rate, self.calibration = start, end, hold, rate, calibration
        self.shape, self.gate, self.uncertainty = shape, gate, uncertainty
        self.lr, self.weight_decay = lr, weight_decay
        self.needs_positive = gate != "none"  # gates are ratios of losses
        self.register_buffer("is_main", torch.tensor([n == (main or self.names[0]) for n in self.names]))
        self.register_buffer("batches", torch.zeros(self.tasks))
        self.register_buffer("sums", torch.zeros(self.tasks))
        self.register_buffer("first", torch.full((self.tasks,), torch.nan))
        self.register_buffer("average", torch.full((self.tasks,), torch.nan))
        if uncertainty != "none":
            self.log_variances = nn.Parameter(torch.zeros(self.tasks))

    def factor(self) -> float:
        """f at the current epoch."""
        t = self.epoch / self.epochs
        # A training may go on after its planned end; f then keeps its last value.
        u = min(1.0, max(0.0, (t - self.hold) / (1 - self.hold)))
        falls = {
            "cosine": (1 + math.cos(math.pi * u)) / 2,
            "square": (1 - u) ** 2,
            "exponential": math.exp(-self.rate * u),
        }
        return self.end + (self.start - self.end) * falls[self.shape]

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        on = torch.ones_like(self.is_main) if present is None else present
        gates = self._gates(losses.detach().to(self.sums), on).to(losses)
        auxiliary = self.factor() * gates
        weights = torch.where(self.is_main, 1.0, auxiliary)
        if self.gate == "guarded":
            others = masked(auxiliary, on & ~self.is_main)
            mean = others.sum() / (on & ~self.is_main).sum().clamp(min=1)
            weights = torch.where(self.is_main, 2 - mean, weights)
        if self.uncertainty == "none":
            return (weights * masked(losses, present)).sum()
        s = self.log_variances
        precision = torch.exp(-s) * losses
        if self.uncertainty == "term":
            return (weights * masked(precision + s, present)).sum()
        return masked(weights * precision + s, present).sum()

    @torch.no_grad()
    def _gates(self, losses: Tensor, on: Tensor) -> Tensor:
        """(T,) the gate of each task; the main task's is not used. Updates the statistics of the present tasks."""
        if self.gate == "none":
            return torch.ones_like(losses)
        if self.gate == "calibrated":
            counts = on & (self.batches < self.calibration)
            self.batches += counts
            self.sums += torch.where(counts, losses, 0.0)
            means = self.sums / self.batches.clamp(min=1)
            main = (means * self.is_main).sum()
            # The gate opens when both the main task and the auxiliary one have seen enough batches with labels.
            full = (self.batches >= self.calibration) & (self.batches * self.is_main).sum().ge(self.calibration)
            return torch.where(full, main / means.clamp(min=1e-12), 1.0)
        self.first.copy_(torch.where(self.first.isnan() & on, losses, self.first))
        # ρ compares a loss with the average before this batch. In the first batch the average is the loss itself.
        average = torch.where(self.average.isnan(), losses, self.average)
        ratio = torch.where(on, losses / average.clamp(min=1e-12), 1.0)
        self.average.copy_(torch.where(on, torch.lerp(average, losses, 0.05), self.average))
        main = (ratio * self.is_main).sum()
        if self.gate == "guarded":
            return torch.exp(-3 * torch.maximum(ratio, main).sub(1).clamp(min=0))
        began = self.first.nan_to_num(nan=1.0).clamp(min=1e-12)
        remaining = (torch.where(on, losses / began, 1.0) * self.is_main).sum()
        return (1 + 0.25 * remaining) * 2 * ratio / (main + ratio).clamp(min=1e-12)
