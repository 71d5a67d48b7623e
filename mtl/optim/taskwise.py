"""Optimizers that keep their statistics for each task: AdaTask and MTL-IO.

They own the update, not the weights: a loss strategy decides what each task's gradient is multiplied by, and the
optimizer what is done with the results. Shared parameters need the tasks' gradients one by one; `mtl.backward(...,
per_task=True)` leaves them as `p.task_grads` (T, *p.shape), already weighted, and the engine asks for that by itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor


class AdaTask(torch.optim.Optimizer):
    """Adaptive learning rates for each task and shared parameter (AdaTask).

    Yang et al., "AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning", AAAI 2023, algorithm
    1: the accumulators m_k, v_k of the base optimizer are kept for every task k, each task's gradient is scaled by its
    own, and the steps add up,

        θ ← θ − lr Σ_k m̂_k / (√v̂_k + ε)              (adam; adagrad and rmsprop have v_k alone, sgd m_k alone)

    The sum is up to T times as long as one Adam step where the tasks agree. A head has one task, so that it follows
    the plain base optimizer. A task that is absent from a batch keeps its accumulators.

    Args:
        params: as in torch.optim.
        lr: learning rate.
        base: whose accumulators are kept.
        betas: decay of m and v (adam); the first is sgd's momentum, the second rmsprop's decay.
        eps: ε.
        weight_decay: decoupled, as AdamW's.
    """

    per_task = True

    def __init__(
        self,
        params,
        lr: Annotated[float, Gt(0)] = 1e-3,
        base: Literal["adam", "adagrad", "rmsprop", "sgd"] = "adam",
        betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999),
        eps: Annotated[float, Gt(0)] = 1e-8,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.base, self.betas, self.eps = base, tuple(betas), eps

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step with `p.task_grads` where a parameter has them, else with `p.grad`."""
        for group in self.param_groups:
            for p in group["params"]:
                rows = getattr(p, "task_grads", None)
                if rows is None and p.grad is None:
                    continue
                present = getattr(p, "task_present", None) if rows is not None else None
                rows = p.grad[None] if rows is None else rows
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * self._steps(p, rows, slice(None), len(rows), present).sum(0))
                p.task_grads = None  # zero_grad does not know of them

    def _steps(self, p: Tensor, rows: Tensor, which: slice, tasks: int, present: Tensor | None = None) -> Tensor:
        """The base optimizer's step for each of the `which` tasks (k, *p.shape), after adding `rows` to their state."""
        state = self.state[p]
        if not state:
            shape = (tasks, *p.shape)
            state["m"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
            state["v"] = torch.zeros_like(state["m"])
            state["t"] = torch.zeros((tasks, *[1] * p.dim()), dtype=p.dtype, device=p.device)
        m, v, t = (state[name][which] for name in ("m", "v", "t"))
        first, second = self.betas
        acts = torch.ones_like(t) if present is None else present.to(t).view(t.shape)
        t += acts
        count = t.clamp(min=1)
        if self.base == "adagrad":
            v += rows * rows  # an absent task's row is 0
            return rows / (v.sqrt() + self.eps)
        if self.base == "sgd":
            m.lerp_(first * m + rows, acts)
            return m * acts
        v.lerp_(rows * rows, (1 - second) * acts)
        if self.base == "rmsprop":
            return rows / (v.sqrt() + self.eps)
        m.lerp_(rows, (1 - first) * acts)
        return acts * (m / (1 - first**count)) / ((v / (1 - second**count)).sqrt() + self.eps)


class MTLIO(AdaTask):
    """Alternating independent optimizers, one for each task (MTL-IO).

    Pascal et al., "Improved Optimization Strategies for Deep Multi-Task Networks", 2021 (arXiv 2109.11678), section 3:
    in every batch the tasks take turns; each makes its own forward pass with the parameters that the tasks before it
    have left, and its own optimizer, which holds all shared parameters and the task's head, makes a step. One batch is
    T steps, and T forward passes, so the learning rate that suits is smaller.

    Args:
        params, lr, base, betas, eps, weight_decay: as in `AdaTask`.
    """

    per_task = False
    alternates = True

    @torch.no_grad()
    def step_task(self, task: int, tasks: int, present: Tensor | None = None) -> None:
        """One step of task number `task` of `tasks` with `p.grad`; parameters without a gradient stay.

        Args:
            present: (1,) bool; a task without labels in the batch misses its turn.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    acts = 1.0 if present is None else present[0].to(p)
                    p.mul_(1 - acts * group["lr"] * group["weight_decay"])
                    step = self._steps(p, p.grad[None], slice(task, task + 1), tasks, present)
                    p.sub_(group["lr"] * step[0])
