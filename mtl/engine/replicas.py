"""A foreign loop on several processes: DistributedDataParallel, a replica of the model and a part of the batch each.

DistributedDataParallel averages what `Tensor.backward` leaves, and knows nothing of gradients of single tasks. So the
losses, the Jacobian and the heads' gradients are averaged here: every process then takes the step that one process
would take with the whole batch, if the parts are equally large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from mtl.losses import hooks
from mtl.losses.base import GramianWeighting, LossWeighting, Strategy, overrides

Group = Any  # torch.distributed.ProcessGroup, which some builds of torch do not have


@dataclass(frozen=True)
class Replicas:
    """The processes that share a batch.

    Args:
        group: the process group.
    """

    group: Group

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)

    def check(self, strategy: Strategy, of_features: bool) -> None:
        """Raises:
        ValueError: the method compares samples of the whole batch, which no process has.
        """
        name = type(strategy).__name__
        if hooks.defines(strategy, "look_ahead"):
            raise ValueError(f"group: {name} tries steps out on parts of the batch, which works in one process only")
        merges = not isinstance(strategy, LossWeighting | GramianWeighting)
        terms = overrides(strategy, LossWeighting, "regulariser") or overrides(strategy, GramianWeighting, "head_terms")
        if terms or (of_features and merges):
            raise ValueError(f"group: {name} works on the features of the whole batch, which needs one process")

    def agree(self, strategy: Strategy) -> None:
        """Before the first step: parameters, buffers and random stream of the first process."""
        first = dist.get_global_rank(self.group, 0) if self.group is not dist.group.WORLD else 0
        with torch.no_grad():
            for tensor in (*strategy.parameters(), *(b for b in strategy.buffers() if b is not None)):
                value = tensor.detach().clone()
                dist.broadcast(value, first, group=self.group)
                tensor.copy_(value)
        strategy.stream_seed()  # decided now, so that it is in the state
        told = [strategy.get_extra_state().tolist()]
        dist.broadcast_object_list(told, first, group=self.group)
        strategy.set_extra_state(torch.tensor(told[0], dtype=torch.uint8))

    def total(self, *tensors: Tensor) -> list[Tensor]:
        """The sum over all processes of each tensor, in one message for each dtype and device."""
        results: list[Tensor] = [t.detach().clone() for t in tensors]
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for t in results:
            kinds.setdefault((t.dtype, t.device), []).append(t)
        for alike in kinds.values():
            flat = torch.cat([t.reshape(-1) for t in alike])
            dist.all_reduce(flat, group=self.group)
            for t, piece in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                t.copy_(piece.view(t.shape))
        return results

    def mean(self, values: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(T,) the means over the processes in which a task is present, and the tasks that are present in any."""
        device = values.device
        if dist.get_backend(self.group) == "nccl":  # which carries tensors of a GPU only
            values, present = values.cuda(), None if present is None else present.cuda()
        share, anywhere = self.shares(present, values)
        (mean,) = self.total(torch.where(share > 0, values * share, 0.0))
        return mean.to(device), None if anywhere is None else anywhere.to(device)

    def shares(self, present: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T,) this process's share of each task's mean loss, and the tasks that are present in any process."""
        here = torch.ones_like(like) if present is None else present.to(like)
        (there,) = self.total(here)
        share = here / there.clamp(min=1)
        return share, None if present is None else there > 0

    def heads(
        self, heads: Sequence[Sequence[Parameter]], own: Sequence[Sequence[Tensor | None]], shares: Tensor
    ) -> list[list[Tensor | None]]:
        """The heads' gradients, of the mean losses over all processes."""
        dense = [
            (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g)
            * share.to(p.device, p.real.dtype)
            for parameters, gradients, share in zip(heads, own, shares, strict=True)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        summed = iter(self.total(*dense))
        return [[next(summed) for _ in parameters] for parameters in heads]


def replicas(group: Group | Literal["auto"] | None) -> Replicas | None:
    """The processes to average over: those of `group`, by default all that torch.distributed has started.

    Returns:
        None where this process is alone.
    """
    if not dist.is_available() or not dist.is_initialized() or group is None:
        return None
    found = Replicas(dist.group.WORLD if group == "auto" else group)
    return found if found.size > 1 else None
