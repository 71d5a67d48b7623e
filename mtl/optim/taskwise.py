"""Optimizers that keep their statistics for each task: AdaTask and MTL-IO.

They change the update, not the weights. A loss strategy decides the weight of each task's gradient, and the optimizer
decides how the weighted gradients move the parameters. For shared parameters it needs the gradient of each task.
`mtl.backward(..., per_task=True)` stores them on the parameter; the engine does so by itself:

    p.task_grads    (T, *p.shape) the tasks' gradients, already weighted; their sum is p.grad
    p.task_present  (T,) bool, False if no backward pass had a label of the task; None if all are present.
                    A head's parameter has one entry (1,), and no task_grads
    p.task_sum      a copy of p.grad from the moment when task_grads were stored
    p.grad.tasks    T, if a backward pass added the merged gradient of several tasks instead

Like p.grad, they add up over several backward passes until `zero_grad` deletes them. A user may change p.grad in
between, for example by clip_grad_norm_, clip_grad_value_ or GradScaler.unscale_. The same change is then made to
task_grads: each element is multiplied by p.grad / p.task_sum, so that the sum stays p.grad. If nothing has changed,
this factor is exactly 1.
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
    """Apply to `p.task_grads` every change made to `p.grad` since they were stored. Call it before adding to either."""
    rows, before = getattr(p, "task_grads", None), getattr(p, "task_sum", None)
    if p.grad is None:  # the model's zero_grad was called; it deletes p.grad only
        forget(p)
    elif rows is not None and before is not None:
        wide = torch.promote_types(p.dtype, torch.float32)  # a sum in half precision would overflow
        whole, old = p.grad.to(wide).abs().sum(), before.to(wide).abs().sum()
        # If the tasks cancel out in an element, its quotient is 0 / 0. The change of the whole gradient is taken there.
        factor = torch.where(old == 0, 1.0, whole / old).to(rows)
        p.task_grads = rows * torch.where(before == 0, factor, p.grad / before)
        p.task_sum = p.grad.detach().clone()


def leave(p: Tensor, rows: Tensor, present: Tensor | None = None) -> None:
    """Add the `rows` (T, *p.shape) of a backward pass to `p.task_grads`. Call it after `settle`.

    p.grad holds the sum of all rows already.
    """
    old, seen = getattr(p, "task_grads", None), getattr(p, "task_present", None)
    if old is not None:
        rows = old + rows
        present = None if present is None or seen is None else seen | present
    p.task_grads, p.task_present, p.task_sum = rows, present, p.grad.detach().clone()


def leave_presence(p: Tensor, present: Tensor | None) -> None:
    """Note on a head's parameter whether its task is `present` (1,). Call it before a backward pass adds to p.grad."""
    # Accumulation: the task counts as present if any earlier pass left a gradient.
    if present is not None and p.grad is not None:
        before = p.grad.to_dense() if p.grad.is_sparse else p.grad
        present = present | (before != 0).any()
    p.task_present = present


def merge(parameters: Iterable[Tensor], tasks: int) -> None:
    """Note on the gradients that they are merged from several `tasks`. `AdaTask.step` then refuses them."""
    for p in parameters:
        if tasks > 1 and p.grad is not None:
            p.grad.tasks = tasks


def forget(p: Tensor) -> None:
    """Delete everything that `leave`, `leave_presence` and `merge` have stored."""
    p.task_grads = p.task_present = p.task_sum = None
    if p.grad is not None:
        p.grad.tasks = None


class AdaTask(torch.optim.Optimizer):
    """Adaptive learning rates for each task and shared parameter (AdaTask).

    Yang et al., "AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning", AAAI 2023, algorithm
    1. The base optimizer has accumulators m_k, v_k for every task k. They scale the gradient of their task, and the
    steps of the tasks add up:

        θ ← θ − lr Σ_k m̂_k / (√v̂_k + ε)              (adam; adagrad and rmsprop have v_k alone, sgd m_k alone)

    If the tasks agree, the sum is up to T times as long as one Adam step. A head has one task, so it follows the plain
    base optimizer. If a task is absent from a batch, its accumulators and its head stay unchanged.

    Args:
        params: as in torch.optim.
        lr: learning rate.
        base: the base optimizer.
        betas: decay of m and v (adam). The first is also sgd's momentum, the second rmsprop's decay.
        eps: ε.
        weight_decay: decoupled weight decay, as in AdamW.
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
        # All options are in the parameter groups, so that a state_dict holds them. The base is stored as a number.
        rule = BASES.index(base)
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "rule": rule, "betas": tuple(betas), "eps": eps}
        )

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("rule", "betas", "eps"):  # an older state_dict does not have them in its groups
                group.setdefault(name, self.defaults[name])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; the tasks' gradients are deleted as well."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                forget(p)

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """Make one step, with `p.task_grads` if a parameter has them, otherwise with `p.grad`.

        Args:
            closure: computes the loss and its gradients again and returns the loss, as in torch.optim.

        Raises:
            RuntimeError: a shared parameter lacks the gradients of the single tasks, or the number of tasks has
                changed. Also if a gradient is sparse or complex.
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
                if rows is None:  # a head: one task. If it is absent, its parameters do not decay either.
                    rows = p.grad[None]
                    decay = decay if present is None else decay * present[0].to(p)
                steps = self._steps(group, p, rows, slice(None), len(rows), present).sum(0)
                p.mul_(1 - decay)
                p.sub_(group["lr"] * steps)
        return loss

    def _steps(
        self, group: dict, p: Tensor, rows: Tensor, which: slice, tasks: int, present: Tensor | None = None
    ) -> Tensor:
        """The base optimizer's step for each of the `which` tasks, after adding `rows` to their accumulators.

        Args:
            group: the parameter group, which holds the options.
            p: the parameter.
            rows: (k, *p.shape) the gradients of k tasks.
            which: the positions of these tasks among all `tasks`.
            tasks: number of tasks that have accumulators.
            present: (k,) bool, False for a task without labels; None if all have some.

        Returns:
            (k, *p.shape), without the learning rate.
        """
        if rows.is_sparse or rows.is_complex():
            kind = "sparse" if rows.is_sparse else "complex"
            raise RuntimeError(f"{type(self).__name__} does not support {kind} gradients; use torch.optim")
        state = self.state[p]
        if not state:
            shape = (tasks, *p.shape)
            state["m"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
            state["v"] = torch.zeros_like(state["m"])
            state["t"] = torch.zeros((tasks, *[1] * p.dim()), dtype=p.dtype, device=p.device)
        # A forgotten per_task=True would merge all tasks into one accumulator. That must be an error.
        if len(state["m"]) != tasks:
            raise RuntimeError(
                f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} has the gradients of {tasks} tasks, and "
                f"had {len(state['m'])} before; call mtl.backward(..., per_task=True) before every step"
            )
        m, v, t = (state[name][which] for name in ("m", "v", "t"))
        first, second = group["betas"]
        base, eps = BASES[group["rule"]], group["eps"]
        acts = torch.ones_like(t) if present is None else present.to(t).view(t.shape)  # 0 for an absent task
        t += acts  # each task counts its own steps, for the bias correction
        count = t.clamp(min=1)
        if base == "adagrad":
            v += rows * rows  # an absent task's row is 0
            return rows / (v.sqrt() + eps)
        if base == "sgd":
            m.lerp_(first * m + rows, acts)
            return m * acts
        # With acts = 0 the accumulators of an absent task stay as they are.
        v.lerp_(rows * rows, (1 - second) * acts)
        if base == "rmsprop":
            return rows / (v.sqrt() + eps)
        m.lerp_(rows, (1 - first) * acts)
        return acts * (m / (1 - first**count)) / ((v / (1 - second**count)).sqrt() + eps)


class MTLIO(AdaTask):
    """Alternating independent optimizers, one for each task (MTL-IO).

    Pascal et al., "Improved Optimization Strategies for Deep Multi-Task Networks", 2021 (arXiv 2109.11678), section 3.
    The tasks take turns in every batch. Each task makes its own forward pass, with the parameters as the task before
    has left them. Its own optimizer then moves all shared parameters and its head. One batch means T steps and T
    forward passes, so a suitable learning rate is smaller.

    Args:
        params, lr, base, betas, eps, weight_decay: as in `AdaTask`.
    """

    per_task = False
    alternates = True

    def step(self, closure=None) -> None:
        """Raises RuntimeError: MTL-IO must know whose turn it is, so `step_task` takes its place."""
        raise RuntimeError("MTLIO: the tasks take turns; call step_task(k, T) after the backward pass of task k's loss")

    @torch.no_grad()
    def step_task(self, task: int, tasks: int, present: Tensor | None = None) -> None:
        """Make the step of one task with `p.grad`. Parameters without a gradient do not move.

        Args:
            task: number of the task, from 0.
            tasks: number of tasks.
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
    """The loss that an optimizer's closure returns; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
