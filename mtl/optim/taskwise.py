"""Optimizers that keep their statistics for each task: AdaTask and MTL-IO.

They own the update, not the weights: a loss strategy decides what each task's gradient is multiplied by, and the
optimizer what is done with the results. `mtl.Step` hands it the gradient of each task; `.grad` holds their sum only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from mtl.config.constructors import checked

BASES = ("adam", "adagrad", "rmsprop", "sgd")


class AdaTask(torch.optim.Optimizer):
    """Adaptive learning rates for each task and shared parameter (AdaTask).

    Yang et al., "AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning", AAAI 2023, algorithm
    1: the accumulators m_k, v_k of the base optimizer are kept for every task k, each task's gradient is scaled by its
    own, and the steps add up,

        θ ← θ − lr Σ_k m̂_k / (√v̂_k + ε)              (adam; adagrad and rmsprop have v_k alone, sgd m_k alone)

    The sum is up to T times as long as one Adam step where the tasks agree. A head has one task, so that it follows
    the plain base optimizer. A task that is absent from a batch keeps its accumulators, and its head rests.

    Args:
        params: as in torch.optim.
        lr: learning rate.
        base: whose accumulators are kept.
        betas: decay of m and v (adam); the first is sgd's momentum, the second rmsprop's decay.
        eps: ε.
        weight_decay: decoupled, as AdamW's.
    """

    per_task = True

    @checked
    def __init__(
        self,
        params,
        lr: Annotated[float, Gt(0)] = 1e-3,
        base: Literal["adam", "adagrad", "rmsprop", "sgd"] = "adam",
        betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999),
        eps: Annotated[float, Gt(0)] = 1e-8,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
    ):
        # In the groups, so that a state_dict holds all of them; the base by its number.
        rule = BASES.index(base)
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "rule": rule, "betas": tuple(betas), "eps": eps}
        )

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("rule", "betas", "eps"):  # a state_dict from before they were in the groups
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def step(
        self,
        closure: None = None,
        *,
        rows: Mapping[Tensor, Tensor] | None = None,
        present: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """One step, as `mtl.Step` makes it. A parameter whose `.grad` is None stays.

        Args:
            closure: none can be given, because the loss alone does not tell the tasks' gradients.
            rows: for each shared parameter, the tasks' weighted gradients (T, *p.shape); their sum is p.grad. Every
                other parameter belongs to one task, or to the method, and p.grad is its row.
            present: for parameters of tasks that may be absent: which of its rows have a label, as (T,) or (1,) bool.

        Raises:
            RuntimeError: `rows` is not given, or a gradient is sparse or complex, or belongs to another number of
                tasks than before.
        """
        if rows is None or closure is not None:
            raise RuntimeError(
                f"{type(self).__name__}: needs the gradient of each task, which `.grad` does not tell; make the update "
                "with mtl.Step(strategy, optimizer, shared, heads)"
            )
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                here, decay = (present or {}).get(p), group["lr"] * group["weight_decay"]
                if (row := rows.get(p)) is None:
                    row = p.grad[None]
                    decay = decay if here is None else decay * here[0].to(p)
                steps = self._steps(group, p, row, slice(None), len(row), here).sum(0)
                p.mul_(1 - decay)
                p.sub_(group["lr"] * steps)

    def _steps(
        self, group: dict, p: Tensor, rows: Tensor, which: slice, tasks: int, present: Tensor | None = None
    ) -> Tensor:
        """The base optimizer's step for each of the `which` tasks (k, *p.shape), after adding `rows` to their state."""
        if rows.is_sparse or rows.is_complex():
            kind = "sparse" if rows.is_sparse else "complex"
            raise RuntimeError(f"{type(self).__name__} does not support {kind} gradients; use torch.optim")
        state = self.state[p]
        if not state:
            shape = (tasks, *p.shape)
            state["m"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
            state["v"] = torch.zeros_like(state["m"])
            state["t"] = torch.zeros((tasks, *[1] * p.dim()), dtype=p.dtype, device=p.device)
        if len(state["m"]) != tasks:
            raise RuntimeError(
                f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} has the gradients of {tasks} tasks, and "
                f"had {len(state['m'])} before; make a new optimizer for other tasks"
            )
        m, v, t = (state[name][which] for name in ("m", "v", "t"))
        first, second = group["betas"]
        base, eps = BASES[group["rule"]], group["eps"]
        acts = torch.ones_like(t) if present is None else present.to(t).view(t.shape)
        t += acts
        count = t.clamp(min=1)
        if base == "adagrad":
            v += rows * rows  # an absent task's row is 0
            return rows / (v.sqrt() + eps)
        if base == "sgd":
            m.lerp_(first * m + rows, acts)
            return m * acts
        v.lerp_(rows * rows, (1 - second) * acts)
        if base == "rmsprop":
            return rows / (v.sqrt() + eps)
        m.lerp_(rows, (1 - first) * acts)
        return acts * (m / (1 - first**count)) / ((v / (1 - second**count)).sqrt() + eps)


class MTLIO(AdaTask):
    """Alternating independent optimizers, one for each task (MTL-IO).

    Pascal et al., "Improved Optimization Strategies for Deep Multi-Task Networks", 2021 (arXiv 2109.11678), section 3.
    In every batch the tasks take turns. Each task makes a forward pass with the parameters as the earlier tasks left
    them. Then the task's own optimizer, over all shared parameters and the task's head, makes a step. So one batch is
    T forward passes and T steps, and smaller learning rates suit.

    Args:
        params, lr, base, betas, eps, weight_decay: as in `AdaTask`.
    """

    per_task = False
    alternates = True

    def step(self, closure: None = None, **tasks: Any) -> None:
        """Refused: a step needs its task's number."""
        raise RuntimeError("MTLIO: the tasks take turns; call step_task(k, T) after the backward pass of task k's loss")

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
                    step = self._steps(group, p, p.grad[None], slice(task, task + 1), tasks, present)
                    p.mul_(1 - acts * group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * step[0])
