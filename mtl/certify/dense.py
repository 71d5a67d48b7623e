"""The same certificates on maps: segmentation, depth and normals of rendered rooms, and a small convolutional network.

    python -m mtl.certify problem=dense                  all methods against their certificates: about five minutes
    python -m mtl.certify problem=dense loss=cagrad      one method

`mtl.certify.problem` sets every loss and gradient. Here they come from tasks: cross-entropy with ignored pixels, L1 of
the depth with holes, and the cosine of normals, some of which are missing. A problem is a batch of rooms and a network
with random weights: the backbone and the decoders of `arch=fcn`, in float64. A property that scales, mixes or turns
tasks does it to these three losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from mtl.archs.fcn import FCN
from mtl.certify.agreement import LARGEST, optimality
from mtl.certify.problem import SIZE, TASKS, Problem, ProblemNetwork, make
from mtl.certify.properties import PROPERTIES, verdicts
from mtl.data.rooms import Rooms
from mtl.losses import Strategy

ROOMS, BATCH, SIDE, WIDTH = 64, 4, 16, 2
# Verdicts that differ for a known reason: (method, property) → the reason.
EXPLAINED = {
    (
        "excess_mtl",
        "linear",
    ): "its constant 1e-7 under the root is no longer small beside the squares of these gradients"
}


@cache
def _rooms() -> tuple[Rooms, Mapping[str, Tensor]]:
    """The data set, and the columns of all its training rooms."""
    rooms = Rooms(train_size=ROOMS, test_size=1, height=SIDE, width=SIDE)
    columns = dict(rooms.splits()["train"].columns)
    columns["image"] = rooms.inputs["image"].ready(columns["image"]).double()
    return rooms, columns


def _network() -> tuple[FCN, nn.ModuleList]:
    """A backbone and a decoder for each kind of task; batch norm uses fixed statistics, so a sample sees no other."""
    backbone = FCN(3, WIDTH)
    return backbone.double().eval(), nn.ModuleList(backbone.decoder(t) for t in _rooms()[0].tasks).double()


@cache
def _skeleton() -> tuple[FCN, nn.ModuleList]:
    """Modules that compute with the parameters that they are given."""
    return _network()


def _named(module: nn.Module, values: Tensor) -> dict[str, Tensor]:
    """A vector as the parameters of `module`."""
    named = dict(module.named_parameters())
    pieces = values.split([p.numel() for p in named.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}


@dataclass(frozen=True)
class RoomTasks(Problem):
    """Tasks whose losses are matrix @ (segmentation, depth, normals) + shift.

    Attributes:
        rows: (N,) the rooms of the batch.
        theta, head: the parameters of the backbone, and of the three decoders. Every task's head has decoders for all
            kinds, which start alike. So a task may be any mixture.
        raw: (3,) the losses of the three kinds.
        matrix, shift: (T, 3) and (T,).
    """

    rows: Tensor
    theta: Tensor
    head: Tensor
    raw: Tensor
    matrix: Tensor
    shift: Tensor
    again: Tensor

    @cached_property
    def values(self) -> Tensor:
        return self.matrix @ self.raw + self.shift

    @cached_property
    def slopes(self) -> Tensor:
        return RoomNetwork(self).gradients()[0]

    def mixed(self, matrix: Tensor) -> RoomTasks:
        return replace(self, matrix=matrix @ self.matrix, shift=matrix @ self.shift, again=matrix @ self.again)

    def turned(self, matrix: Tensor) -> RoomTasks:
        turned = matrix @ self.matrix
        return replace(self, matrix=turned, shift=self.values - turned @ self.raw)

    def batches(self, samples: int) -> list[slice]:
        half, whole = len(self.rows) // 2, slice(0, len(self.rows))
        pair = [slice(0, half), slice(half, None)]
        return {1: [whole], 2: pair, 3: [*pair, whole]}[samples]

    def network(self, strategy: Strategy, present: Tensor | None = None) -> RoomNetwork:
        return RoomNetwork(self if len(self.values) == strategy.tasks else self.taken(range(strategy.tasks)), present)


class RoomNetwork(ProblemNetwork):
    """The backbone's and the heads' parameters, and the losses of parts of the batch."""

    def __init__(self, tasks: RoomTasks, present: Tensor | None = None):
        self.tasks, self.present = tasks, present
        self.theta = nn.Parameter(tasks.theta.clone())
        self.heads = [nn.Parameter(tasks.head.clone()) for _ in tasks.matrix]

    def losses(self, batch: slice) -> tuple[list[Tensor], Tensor]:
        (_, columns), backbone = _rooms(), _skeleton()[0]
        features = functional_call(backbone, _named(backbone, self.theta), columns["image"][self.tasks.rows[batch]])
        there = [True] * len(self.heads) if self.present is None else self.present.tolist()
        none = torch.zeros((), dtype=torch.float64)
        return [self._loss(i, features, batch) if on else none for i, on in enumerate(there)], features

    def _loss(self, i: int, features: Tensor, batch: slice) -> Tensor:
        """() the loss of task i: its mixture of the kinds, from its own head."""
        kinds = self.tasks.matrix[i].nonzero().flatten().tolist() or [0]  # without any, the loss has a gradient of 0
        parts = [self.tasks.matrix[i, j] * self._raw(j, self.heads[i], features, batch) for j in kinds]
        return sum(parts, self.tasks.shift[i])

    def _raw(self, kind: int, head: Tensor, features: Tensor, batch: slice) -> Tensor:
        """() the loss of one kind: segmentation, depth or normals."""
        (rooms, columns), decoders = _rooms(), _skeleton()[1]
        task, rows, start = rooms.tasks[kind], self.tasks.rows, f"{kind}."
        own = {key.removeprefix(start): p for key, p in _named(decoders, head).items() if key.startswith(start)}
        prediction, labels = functional_call(decoders[kind], own, features), columns[task.column]
        # Divided by a share of the whole batch's labels, so that the mean of two halves is the whole.
        units = task.count(labels[rows]) * len(features) / len(rows)
        return task.criterion(prediction, labels[rows[batch]]).sum() / units


def problem(seed: int, dimensions: int = SIZE, kind: str = "") -> RoomTasks:
    """Segmentation, depth and normals of a few rooms, in a network with random weights.

    Args:
        seed: chooses rooms and weights.
        dimensions: if there are few, every second problem's tasks are random mixtures of the three losses. So conflicts
            are frequent. Otherwise the losses are the three themselves.
        kind: as in `mtl.certify.problem.problem`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(ROOMS, generator=generator)[:BATCH]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theta, head = (parameters_to_vector(part.parameters()).detach() for part in _network())
    one, none = torch.eye(TASKS, dtype=torch.float64), torch.zeros(TASKS, dtype=torch.float64)
    tasks = RoomTasks(rows, theta, head, none, one, none, none)
    with torch.no_grad():
        raw = torch.stack(RoomNetwork(tasks).losses(slice(0, BATCH))[0])
    fall = 0.7 + 0.25 * torch.rand(TASKS, generator=generator, dtype=torch.float64)
    tasks, turn = replace(tasks, raw=raw, again=raw * fall), one.clone()
    if dimensions < SIZE and seed % 2:
        turn = torch.randn(TASKS, TASKS, generator=generator, dtype=torch.float64)
    if kind == "opposite":
        turn[1] = 0.1 * turn[1] - turn[0]
    if kind:
        turn[seed % TASKS] *= 0.1
    return tasks.turned(turn)


def differences(name: str) -> tuple[list[str], list[str]]:
    """The verdicts on maps that differ from those on vectors: the faults, and the explained ones."""
    if make(name).flat:
        return [], ["not measured: it works on features (N, F), a vector for each sample"]
    faults, notes = [], []
    pairs = [dict(zip(("first", "later"), verdicts(name, *source), strict=True)) for source in ((), (problem,))]
    for key in PROPERTIES:
        vectors, maps = ([one[when][key] for when in ("first", "later")] for one in pairs)
        if vectors != maps:
            # As in "linear: [True, True] on vectors, [True, False] on maps (first step, later)".
            line = f"{key}: {vectors} on vectors, {maps} on maps (first step, later)"
            reason = EXPLAINED.get((name, key))
            (faults if reason is None else notes).append(line + ("" if reason is None else f": {reason}"))
    residual = optimality(name, problem)
    if residual is not None and not residual < LARGEST:
        faults.append(f"misses its optimality conditions on maps by {residual:.2g}")
    return faults, notes
