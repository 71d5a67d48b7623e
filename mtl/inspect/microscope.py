"""The gradient microscope: how far the gradients of tasks, and of samples, agree during training with any method.

After Elich, Kirchdorfer, Köhler, Schott, "Examining Common Paradigms in Multi-Task Learning" (2024), section 4.2. Their
point: a conflict between tasks means little by itself. It must be compared with the conflict between samples of one
task. Three statistics are measured for a pair of gradients a, b of the shared parameters, and of each layer group. The
first two are from Yu et al., "Gradient Surgery for Multi-Task Learning", 2020.

    cosine         aᵀb / (‖a‖ ‖b‖)
    magnitude      2 ‖a‖ ‖b‖ / (‖a‖² + ‖b‖²)
    sign_conflict  share of the elements with opposite signs. Zeros never count as conflicts. An element that is zero
                   up to rounding has a random sign, such as the bias of a convolution before batch norm.

Each is averaged over pairs. A pair with a gradient of exactly 0 counts as 0 in all three, as in `mtl.backward`. There
are four kinds of pairs:

    tasks              two tasks, each with the gradient of its loss on the whole batch (the paper's figure A4)
    tasks_per_sample   two tasks at one sample, over all observed samples (the paper's "inter-task")
    samples/<task>     two samples, for one task (the paper's "inter-sample")
    samples/combined   two samples, for the weighted sum of the task losses. The weights are this step's, or 1 if the
                       method has none.

Tasks without a label in the batch and samples without the task's label are left out. The samples are the first ones of
the batch, which is in random order. The paper takes eight of them, every five steps.

The paper does not define a sample's gradient under batch norm. We take the gradient of the sample's own loss in the
batch's forward pass, through the batch statistics. The mean over all samples is then the gradient of the task's loss.
Every pair of task and sample costs one backward pass of the whole batch.

A run ends in the same bits with and without the microscope. It draws no random numbers and does not touch `.grad`. It
makes no second forward pass, except with optimizer=mtl_io, whose tasks take turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.archs.model import Model
from mtl.data.columns import Batch
from mtl.losses.base import FLOOR, masked
from mtl.losses.solvers import double
from mtl.metrics.tally import Tally
from mtl.tasks import Task
from mtl.tasks.predictions import each

STATISTICS = ("cosine", "magnitude", "sign_conflict")
USUAL = 8  # samples that are compared, as in the paper
COPIED = 2**24  # numbers: 128 MiB in float64
COMBINED, WHOLE = "combined", "all"


@dataclass(frozen=True)
class Microscope:
    """The settings: in which steps to measure, and how many samples.

    Args:
        every: observe steps 0, k, 2k, … of each epoch; 0 is off.
        samples: number of samples to compare, from the start of a batch; 0 compares tasks only. None: eight, or the
            whole batch if it is smaller. An observed step holds T · samples gradients of the shared parameters in
            memory.
    """

    every: Annotated[int, Ge(0)] = 0
    samples: Annotated[int, Ge(0)] | None = None

    @property
    def most(self) -> int:
        """The number of samples that are compared in a batch that has as many."""
        return USUAL if self.samples is None else self.samples

    def check(self, batch_size: int, tasks: Sequence[str]) -> None:
        """Check the settings against the run's batches and tasks.

        Raises:
            ValueError: `samples` is larger than a batch, or a task has the reserved name "combined".
        """
        if self.every and self.samples is not None and self.samples > batch_size:
            raise ValueError(f"samples={self.samples}: must be at most data.batch_size={batch_size}")
        if self.every and COMBINED in tasks:
            raise ValueError(f"every={self.every}: a task is called {COMBINED!r}, as the sum of the tasks is here")

    def looks(self, step: int) -> bool:
        """Whether step number `step` of an epoch, counted from 0, is observed."""
        return self.every > 0 and step % self.every == 0

    def describe(
        self, tasks: int, usual: int, reuses: bool, alternates: bool, steps: int, batch_size: int, size: int
    ) -> str:
        """One line about the cost, and how to lower a large one; empty if the microscope is off.

        Args:
            tasks: number of tasks.
            usual: cost of an ordinary step, in forward passes; a backward pass counts as two.
            reuses: whether the step's own Jacobian can be reused.
            alternates: whether the tasks take turns, so that an observed step needs an extra forward pass.
            steps: number of steps in an epoch.
            batch_size: number of samples in a step.
            size: bytes of the shared parameters' gradients of one loss.
        """
        if not self.every:
            return ""
        samples = min(self.most, batch_size)
        of_tasks = tasks if tasks > 1 and not reuses else 0
        passes = samples * tasks + of_tasks
        extra = (2 * passes + alternates) / usual * math.ceil(steps / self.every) / steps
        held = samples * tasks * size / 2**30
        memory = f" and at least {held:.1f} GiB of memory" if held >= 1 else ""
        cheaper = f"; microscope.samples=0 leaves {of_tasks} of the passes" if samples and extra > 1 else ""
        return (
            f"every {self.every} steps, {samples} samples: {passes} more backward passes on such a step, "
            f"about +{100 * extra:.0f} % time{memory}{cheaper}"
        )


class GradientObserver:
    """One epoch under the microscope. An observed step calls `before`, maybe `jacobian`, and `after`, in this order.

    Args:
        samples: number of samples to compare, `Microscope.most`; fewer if a batch is smaller.
        tasks: in the order of the model's heads.
        model: the model whose gradients are compared.
        log: whether the step's losses are log-losses.
        reuses: whether the step computes exactly the Jacobian that is needed: of the task losses, for the shared
            parameters, on the whole batch.
        tally: sums up the statistics on the device.

    Attributes:
        reuses: as the argument, but False for a single task. If True, the step must call `jacobian`.
    """

    def __init__(self, samples: int, tasks: Sequence[Task], model: Model, log: bool, reuses: bool, tally: Tally):
        self.tasks, self.samples, self.tally = tasks, samples, tally
        self.log, self.several = log, len(tasks) > 1
        self.reuses = self.several and reuses
        groups = layer_groups(model)
        self.parameters = [p for group in groups.values() for p in group]
        self.group_of = [i for i, group in enumerate(groups.values()) for _ in group]
        self.groups = [*groups, WHOLE]
        counts = [sum(p.numel() for p in group) for group in groups.values()]
        self.counts = [*counts, sum(counts)]
        names = [f"samples/{t.name}" for t in self.tasks] if self.samples else []
        if self.several:
            names = ["tasks", *(["tasks_per_sample", *names, f"samples/{COMBINED}"] if names else [])]
        self.names = names
        # The columns of each parameter in a Jacobian. Its columns are in the order of the shared parameters, and
        # `self.parameters` are in the order of the layer groups.
        start, ends = {}, 0
        for p in model.shared_parameters():
            if p.requires_grad:
                start[p], ends = ends, ends + p.numel()
        self.columns = [slice(start[p], start[p] + p.numel()) for p in self.parameters]

    def before(self, predictions: Sequence[Any], losses: Sequence[Tensor], batch: Batch) -> None:
        """Compute the gradients of tasks and samples, before the update. The graph is kept for the step itself.

        Args:
            predictions: each task's predictions (N, …), with their graph.
            losses: T scalars, means over the labelled samples.
            batch: contains the labels.
        """
        labelled = torch.stack([t.labelled(t.select(batch[t.column])) for t in self.tasks])  # (T, N)
        size = min(self.samples, labelled.shape[1])
        self.present, self.labelled = labelled.any(1), labelled[:, :size]
        self.losses = torch.stack([loss.detach() for loss in losses])
        self.between_tasks = None
        # If the step computes the tasks' gradients itself, `jacobian` gets them later. Otherwise we compute them here.
        if self.several and not self.reuses:
            rows = [self._gradients(loss) for loss in losses]
            self.between_tasks = self._moments(torch.stack(row)[None] for row in zip(*rows, strict=True))
        self.rows = []  # T x S lists of the parameters' gradients
        for t, p in zip(self.tasks, predictions, strict=True):
            # `criterion` gives one loss per sample. Each needs a backward pass of its own through the whole batch.
            few = each(lambda part: part[:size], p)
            values = t.criterion(few, t.select(batch[t.column])[:size]) if size else []
            self.rows.append([self._gradients(value) for value in values])

    def jacobian(self, jacobian: Tensor) -> None:
        """Take the (T, P) Jacobian that the step computes anyway. Only (T, T) inner products of it are kept."""
        if self.reuses:
            self.between_tasks = self._moments(jacobian[None, :, columns] for columns in self.columns)

    @torch.no_grad()
    def after(self, weights: Tensor | None) -> None:
        """Add the step's statistics to the sums.

        Args:
            weights: (T,) the step's weights of the tasks' gradients; None if the method has no weights.
        """
        found = []
        if self.several:
            found.append(self._similarities(self.between_tasks, self.present[None]))
        if self.names and self.samples:
            found += self._of_samples(torch.ones_like(self.losses) if weights is None else weights)
        self.rows, self.between_tasks = [], None  # frees memory: there is one gradient for each task and sample
        # The mean over this step's pairs is added, and a step counts only if it had such a pair. So each observed step
        # counts the same, however many labels it has.
        if found:
            totals, pairs = (torch.cat(parts) for parts in zip(*found, strict=True))
            self.tally.add("micro", totals / pairs.clamp(min=1)[:, None, None])
            self.tally.add("micro/steps", pairs > 0)

    def figures(self, read: Mapping[str, Tensor]) -> dict[str, float]:
        """{"micro/tasks/cosine/layer1": …}: means over the observed steps that had such a pair.

        Args:
            read: the sums of the epoch, as from `Tally.read`.
        """
        if "micro" not in read:
            return {}
        row, values = {}, iter(read["micro"].flatten().tolist())
        for name, steps in zip(self.names, read["micro/steps"].tolist(), strict=True):
            for statistic in STATISTICS:
                for group in self.groups:
                    value = next(values)
                    if steps:
                        row[f"micro/{name}/{statistic}/{group}"] = value / steps
        return row

    def _of_samples(self, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self.log:  # the weights belong to log-losses: w ∇ log L = (w / L) ∇L
            weights = torch.where(self.losses > FLOOR, weights / self.losses, 0.0)
        weights = double(masked(weights, self.present))
        labelled, groups = self.labelled, len(self.counts) - 1
        by_task, by_sample, combined = (_Moments(groups) for _ in range(3))
        for k, group in enumerate(self.group_of):
            # One parameter at a time: stacking all gradients at once would need their memory a second time.
            rows = torch.stack([torch.stack([g[k].flatten() for g in of_task]) for of_task in self.rows])
            by_task.add(group, rows)  # (T, S, p)
            if self.several:
                by_sample.add(group, rows.transpose(0, 1))
                combined.add(group, torch.tensordot(weights, double(rows), 1)[None])
        found = [self._similarities(by_task.read(), labelled)]
        if self.several:
            totals, pairs = self._similarities(by_sample.read(), labelled.T)
            found.insert(0, (totals.sum(0, keepdim=True), pairs.sum(0, keepdim=True)))
            found.append(self._similarities(combined.read(), labelled.any(0)[None]))
        return found

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]

    def _moments(self, blocks: Iterable[Tensor]) -> Tensor:
        moments = _Moments(len(self.counts) - 1)
        for group, block in zip(self.group_of, blocks, strict=True):
            moments.add(group, block.flatten(2))
        return moments.read()

    def _similarities(self, moments: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The three statistics of B sets of K vectors, summed over the pairs of each set.

        Args:
            moments: (G, B, 3, K, K) for G layer groups, as from `_Moments.read`.
            there: (B, K) bool, False for vectors to leave out, such as an absent task's gradient.

        Returns:
            (B, 3, G) the sums, and (B,) the number of pairs.
        """
        gram, signs, both = moments.unbind(2)
        tiny = torch.finfo(gram.dtype).tiny
        squares = gram.diagonal(dim1=-2, dim2=-1)
        lengths = squares.sqrt()
        products = lengths[..., :, None] * lengths[..., None, :]
        cosines = gram / products.clamp(min=tiny)
        magnitudes = 2 * products / (squares[..., :, None] + squares[..., None, :]).clamp(min=tiny)
        # For signs s, s' of two vectors (−1, 0 or 1): Σ |s| |s'| − Σ s s' is twice the number of opposite signs.
        opposite = torch.stack([x / (2 * count) for x, count in zip(both - signs, self.counts, strict=True)])
        upper = torch.ones_like(gram[0, 0], dtype=torch.bool).triu(1)
        pairs = there[:, :, None] & there[:, None, :] & upper
        values = torch.where(pairs, torch.stack([cosines, magnitudes, opposite]), 0.0)
        return values.sum((-2, -1)).permute(2, 0, 1), pairs.sum((-2, -1))


class _Moments:
    """Inner products of B sets of K vectors, summed piece by piece: of the vectors, their signs, and the signs' sizes.

    The statistics follow from these. They are in float64, because squares of small gradients underflow in float32.
    """

    def __init__(self, groups: int):
        self.sums: list[Tensor | None] = [None] * groups

    def add(self, group: int, block: Tensor) -> None:
        """Add p further elements of every vector: `block` (B, K, p), which belongs to layer group `group`."""
        # The copies in float64 take six times the memory of the gradients, so of large ones there are a few at a time.
        for piece in block.split(max(1, COPIED // block[..., 0].numel()), -1):
            self._add(group, piece)

    def _add(self, group: int, block: Tensor) -> None:
        block = double(block)
        signs = block.sign()
        some = signs.abs()
        moments = torch.stack([block @ block.mT, signs @ signs.mT, some @ some.mT], 1)
        known = self.sums[group]
        self.sums[group] = moments if known is None else known + moments

    def read(self) -> Tensor:
        """(groups + 1, B, 3, K, K) inner products of each group; the last entry is over all elements."""
        groups = torch.stack(self.sums)
        return torch.cat([groups, groups.sum(0, keepdim=True)])


def layer_groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """The trainable shared parameters by layer group.

    By default a group is a child of the model's trunk (the backbone): the first part of a parameter's name. The trunk
    may declare other groups with an attribute `layer_groups` = {group: [prefixes of parameter names]}.
    """
    declared = [(f"{p}.", name) for name, parts in getattr(model.trunk, "layer_groups", {}).items() for p in parts]
    shared = {id(p) for p in model.shared_parameters()}
    groups: dict[str, list[nn.Parameter]] = {}
    for key, parameter in model.trunk.named_parameters():
        if parameter.requires_grad and id(parameter) in shared:
            name = next((n for prefix, n in declared if f"{key}.".startswith(prefix)), key.partition(".")[0])
            groups.setdefault(name, []).append(parameter)
    return groups
