"""Optimizers that keep their statistics for each task: AdaTask and MTL-IO.

They own the update, not the weights: a loss strategy decides what each task's gradient is multiplied by, and the
optimizer what is done with the results. Shared parameters need the tasks' gradients one by one; `mtl.backward(...,
per_task=True)` leaves them on the parameter, and the engine asks for that by itself:

    p.task_grads    (T, *p.shape) the tasks' gradients, already weighted; their sum is p.grad
    p.task_present  (T,) bool, False where no backward pass held a label of the task; None when all are present. A
                    head's parameter has it as well, (1,), and no rows
    p.task_sum      p.grad as it was when the rows were left
    p.grad.tasks    T, where a backward pass added the merged gradient of several tasks instead

Like p.grad they add up over several backward passes, until `zero_grad` forgets them. What is done to p.grad in between
(clip_grad_norm_, clip_grad_value_, GradScaler.unscale_) is done to the rows as well: each element of them is multiplied
by p.grad / p.task_sum, so that their sum stays p.grad. It is 1 exactly where nothing has been done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from mtl.config.constructors import checked

BASES = ("adam", "adagrad", "rmsprop", "sgd")


def settle(p: Tensor) -> None:
    """Do to `p.task_grads` what has been done to `p.grad` since they were left; before more is added to either."""
    rows, before = getattr(p, "task_grads", None), getattr(p, "task_sum", None)
    if p.grad is None:  # forgotten by the model's zero_grad, which does not know of the rows
        forget(p)
    elif rows is not None and before is not None:
        wide = torch.promote_types(p.dtype, torch.float32)  # a sum in half precision would overflow
        whole, old = p.grad.to(wide).abs().sum(), before.to(wide).abs().sum()
        # Where the tasks cancel out there is no quotient: the change of the whole gradient is taken.
        factor = torch.where(old == 0, 1.0, whole / old).to(rows)
        p.task_grads = rows * torch.where(before == 0, factor, p.grad / before)
        p.task_sum = p.grad.detach().clone()


def leave(p: Tensor, rows: Tensor, present: Tensor | None = None) -> None:
    """Add a backward pass's `rows` (T, *p.shape) to those of `p`, after `settle`; p.grad has their sum by now."""
    old, seen = getattr(p, "task_grads", None), getattr(p, "task_present", None)
    if old is not None:
        rows = old + rows
        present = None if present is None or seen is None else seen | present
    p.task_grads, p.task_present, p.task_sum = rows, present, p.grad.detach().clone()


def leave_presence(p: Tensor, present: Tensor | None) -> None:
    """Note on a head's parameter whether its task is `present` (1,), before a backward pass adds to its gradient."""
    if present is not None and p.grad is not None:  # it was in an earlier pass that left something
        before = p.grad.to_dense() if p.grad.is_sparse else p.grad
        present = present | (before != 0).any()
    p.task_present = present


def merge(parameters: Iterable[Tensor], tasks: int) -> None:
    """Note on the gradients that they are merged from several `tasks`: no statistics for each task can use them."""
    for p in parameters:
        if tasks > 1 and p.grad is not None:
            p.grad.tasks = tasks


def forget(p: Tensor) -> None:
    """Drop what `leave`, `leave_presence` and `merge` have left."""
    p.task_grads = p.task_present = p.task_sum = None
    if p.grad is not None:
        p.grad.tasks = None


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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; the tasks' gradients are forgotten as well."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                forget(p)

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """One step with `p.task_grads` where a parameter has them, else with `p.grad`.

        Args:
            closure: computes the loss again, with its gradients, and returns it; as in torch.optim.

        Raises:
            RuntimeError: a shared parameter lacks the gradients of single tasks, or had other tasks' before, or its
                gradient is sparse or complex.
        """
        loss = _evaluated(closure)
        for group in self.param_groups:
            for p in group["params"]:
                settle(p)
                if p.grad is None:
                    continue
                if tasks := getattr(p.grad, "tasks", None):
                    raise RuntimeError(
                        f"{type(self).__name__}: the gradient of a parameter of shape {tuple(p.shape)} is merged from "
                        f"{tasks} tasks; call mtl.backward(..., per_task=True), which leaves those of single tasks"
                    )
                rows, present = getattr(p, "task_grads", None), getattr(p, "task_present", None)
                decay = group["lr"] * group["weight_decay"]
                if rows is None:
                    rows = p.grad[None]
                    decay = decay if present is None else decay * present[0].to(p)
                steps = self._steps(group, p, rows, slice(None), len(rows), present).sum(0)
                p.mul_(1 - decay)
                p.sub_(group["lr"] * steps)
        return loss

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
                f"had {len(state['m'])} before; call mtl.backward(..., per_task=True) before every step"
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

    Pascal et al., "Improved Optimization Strategies for Deep Multi-Task Networks", 2021 (arXiv 2109.11678), section 3:
    in every batch the tasks take turns; each makes its own forward pass with the parameters that the tasks before it
    have left, and its own optimizer, which holds all shared parameters and the task's head, makes a step. One batch is
    T steps, and T forward passes, so the learning rate that suits is smaller.

    Args:
        params, lr, base, betas, eps, weight_decay: as in `AdaTask`.
    """

    per_task = False
    alternates = True

    def step(self, closure=None) -> None:
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


def _evaluated(closure) -> Tensor | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
