"""signSGD with momentum (Signum): every parameter moves by the same amount, independent of the gradients' scale."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from mtl.config.constructors import checked


class Signum(torch.optim.Optimizer):
    """signSGD with momentum.

    Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018, algorithm 2:

        m ← β m + (1 − β) g,     θ ← θ − lr (sign(m) + λ θ).

    Suitable learning rates are those of Adam, far below SGD's. Each head is exactly invariant to the scale of its loss.

    Args:
        params: as in torch.optim.
        lr: learning rate, the size of every parameter's step.
        momentum: β; 0 is plain signSGD.
        weight_decay: λ.
    """

    @checked
    def __init__(
        self,
        params,
        lr: Annotated[float, Gt(0)] = 1e-4,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """Make one step.

        Args:
            closure: computes the loss and its gradients again and returns the loss, as in torch.optim.

        Raises:
            RuntimeError: a gradient is sparse or complex. Such gradients are not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.grad.is_complex():
                    raise RuntimeError("Signum does not support sparse or complex gradients; use torch.optim")
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                state["m"].lerp_(p.grad, 1 - group["momentum"])
                # Decoupled weight decay: inside the sign it would do nothing to parameters with large gradients.
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["m"].sign())
        return loss
