"""The properties of a method's steps, each as a function that measures it.

A property takes the name of a method, the length of a history, and the source of its problems. It tells whether it
holds for the steps after that history; length 0 means the very first step. If a property changes the losses of a
problem, it changes those of the history in the same way. Directions are compared for the shared parameters and for
each head.

The docstrings of the properties are printed on the pages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from mtl.certify.problem import (
    EPOCHS,
    HISTORY,
    TASKS,
    Change,
    Problem,
    Source,
    Update,
    count,
    experienced,
    fixed,
    make,
    problem,
    step,
)
from mtl.losses import Custom, Strategy
from mtl.losses.hooks import knows_absent

TOLERANCE = 1e-5  # largest angle in radians of equal directions, and largest relative error of equal steps
SMALL = 1e-4  # largest relative length that counts as 0; iterations and floors of a method leave this much
# At a Pareto-stationary point some methods have weights of 1e10, which magnify the rounding of the gradients.
REST = 1e-3
MEASURED = 1000  # seed of the measured problem; the problems of a history have the seeds 0, 1, …


def apart(a: Tensor, b: Tensor) -> float:
    """Distance between the directions of two vectors: their angle, if it is small. 0 for two zero vectors."""
    lengths = a.norm(), b.norm()
    if max(lengths) == 0:
        return 0.0
    return float((a / lengths[0].clamp(min=1e-300) - b / lengths[1].clamp(min=1e-300)).norm())


def parallel(a: Update, b: Update) -> bool:
    """Whether the shared parameters and all heads move in the same directions."""
    return all(apart(x, y) < TOLERANCE for x, y in zip((a.shared, *a.heads), (b.shared, *b.heads), strict=True))


def equal(a: Update, b: Update) -> bool:
    """Whether the steps of the shared parameters and of all heads are the same, and the weights too."""
    pairs = [(a.shared, b.shared), (a.heads, b.heads)]
    pairs += [] if a.weights is None or b.weights is None else [(a.weights, b.weights)]
    return all((x - y).norm() <= TOLERANCE * x.norm() for x, y in pairs)


def selected(name: str, strategy: Strategy, index: Sequence[int]) -> Strategy:
    """A strategy for the tasks `index`, in that order, with their part of the state.

    Every dimension of size T in the state belongs to the tasks, and is selected. Weights that add up to T or to 1 are
    rescaled to the number of tasks that are left, or to 1. If all of these are zero, equal weights take their place.
    """
    index = [i for i in index if i < strategy.tasks]  # loss=single trains one task
    if isinstance(strategy, Custom) and index == list(range(strategy.tasks)):
        part = copy.deepcopy(strategy)  # a user's module may keep its state in any attribute
        part.epoch_start(HISTORY, EPOCHS)
        return part
    state = strategy.memory()
    for key, value in state.items():
        total = value.sum() if value.shape == (strategy.tasks,) and value.is_floating_point() else torch.zeros(())
        for dimension, size in enumerate(value.shape):
            if size == strategy.tasks:
                value = value.index_select(dimension, torch.tensor(index))
        # Only weights with such a sum are rescaled. Other state, such as an average loss, stays as it is.
        for whole, left in ((strategy.tasks, len(index)), (1, 1)):
            if abs(total - whole) < 1e-6:
                value = value * (left / value.sum()) if value.any() else torch.full_like(value, left / len(value))
        state[key] = value
    part = make(name, len(index))
    part.load_state_dict(state)
    part.epoch_start(HISTORY, EPOCHS)
    return part


def copies(name: str, strategy: Strategy) -> Callable[[], Strategy]:
    """A function that makes strategies, all in the state of `strategy`."""
    return lambda: selected(name, strategy, range(TASKS))


@contextmanager
def drawn_for(index: Sequence[int], tasks: int) -> Iterator[None]:
    """Let reordered or selected tasks keep their random draws, so that methods are compared with the same draws.

    In this block, torch.rand and torch.randn draw for all `tasks` whenever a size equals the number of selected tasks.
    Then the entries of the tasks `index` are taken.
    """

    def matched(draw: Callable) -> Callable:
        def call(*size, generator=None, **options):
            size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
            if generator is None:
                return draw(*size, **options)
            values = draw([tasks if n == len(index) else n for n in size], generator=generator, **options)
            for dimension, n in enumerate(size):
                if n == len(index):
                    values = values.index_select(dimension, torch.tensor(index))
            return values

        return call

    with mock.patch.multiple(torch, rand=matched(torch.rand), randn=matched(torch.randn)):
        yield


def scale_free(name: str, history: int, source: Source = problem) -> bool:
    """scaling all losses by 1e-6 or 1e6 does not change the directions of the shared parameters and the heads"""
    changes: list[Change] = [lambda t, c=c: t.scaled(c) for c in (1.0, 1e-6, 1e6)]
    makers = [(change, copies(name, experienced(name, change, history, source=source))) for change in changes]
    for seed in range(3):
        tasks = source(MEASURED + seed, dimensions=4)
        plain, *others = (step(new(), change(tasks)) for change, new in makers)
        if not all(parallel(plain, other) for other in others):
            return False
    return True


def task_scale_free(name: str, history: int, source: Source = problem) -> bool:
    """scaling each loss by another factor does not change the directions of the shared parameters and the heads"""
    plain = copies(name, experienced(name, steps=history, source=source))
    for factors in torch.tensor([[10.0, 0.1, 3.0], [3.0, 10.0, 0.1], [0.1, 3.0, 10.0]], dtype=torch.float64):
        # The history is scaled as well: a method that adapts to the scale has seen no other.
        scaled = copies(name, experienced(name, lambda t, c=factors: t.scaled(c), history, source=source))
        for seed in range(4):
            tasks = source(MEASURED + seed, dimensions=4)
            if not parallel(step(plain(), tasks), step(scaled(), tasks.scaled(factors))):
                return False
    return True


def linear(name: str, history: int, source: Source = problem) -> bool:
    """linear under scaling: A(diag(a + b) J) = A(diag(a) J) + A(diag(b) J)"""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in ([3.0, 0.2, 0.5], [0.1, 5.0, 1.0]))
    changes: list[Change] = [lambda t, c=c: t.scaled(c) for c in (a, b, a + b)]
    makers = [(change, copies(name, experienced(name, change, history, source=source))) for change in changes]
    for seed in range(10):
        tasks = source(MEASURED + seed, dimensions=4, kind=("", "opposite")[seed % 2])
        one, two, both = (step(new(), change(tasks)).shared for change, new in makers)
        if not (one + two - both).norm() <= SMALL * both.norm():
            return False
    return True


def non_conflicting(name: str, history: int, source: Source = problem) -> bool:
    """the step never goes against a task: g_i·d ≥ 0 for all i, on 72 random problems (gradients of similar lengths, one
    ten times shorter than the others, two nearly opposite)"""
    for start in (0, 100):  # two histories
        new = copies(name, experienced(name, steps=history, start=start, source=source))
        for seed in range(36):
            kind = ("", "short", "short", "opposite")[seed % 4]
            tasks, strategy = source(MEASURED + start + seed, 4, kind).taken(range(count(name))), new()
            shared, heads = tasks.network(strategy).gradients()  # before the step: it may change the views
            shared = torch.cat([shared, tasks.slopes[strategy.tasks :]])  # with the tasks that loss=single leaves out
            update = step(strategy, tasks)
            for gradients, d in ((shared, update.shared.expand(count(name), -1)), (heads, update.heads)):
                if not ((gradients * d).sum(1) >= -1e-7 * gradients.norm(dim=1) * d.norm(dim=1)).all():
                    return False
    return True


def stationary(name: str, history: int, source: Source = problem) -> bool:
    """stops at a Pareto-stationary point: d = 0 if a combination of all gradients with positive weights is 0"""
    new = copies(name, experienced(name, steps=history, source=source))
    for seed in range(6):
        # The last gradient makes ½ g_1 + 2 g_2 + g_3 = 0, on the batch and on each half of it.
        turn = torch.eye(count(name), dtype=torch.float64)
        turn[-1] = torch.tensor([*(-0.5, -2.0)[: count(name) - 1], 0.0])
        tasks = source(MEASURED + seed).taken(range(count(name)))
        # The step of the same tasks before they are turned says how long this method's steps are.
        if not step(new(), tasks.turned(turn)).shared.norm() <= REST * step(new(), tasks).shared.norm():
            return False
    return True


def unanimous(name: str, history: int, source: Source = problem) -> bool:
    """follows the common gradient if all tasks are identical"""

    def change(tasks: Problem) -> Problem:
        return tasks.taken([0] * TASKS)

    strategy, tasks = experienced(name, change, history, source=source), change(source(MEASURED))
    common = tasks.network(strategy).gradients()[0][0]
    return apart(step(strategy, tasks).shared, common) < TOLERANCE


def permutation(name: str, history: int, source: Source = problem) -> bool | None:
    """the order of the tasks does not matter: reordering tasks, state and draws changes no weight and no step"""
    old, tasks_there = experienced(name, steps=history, source=source), count(name)
    if isinstance(old, Custom) and history:
        return None  # a user's module does not say which part of its state belongs to which task
    order = [tasks_there - 1, *range(tasks_there - 1)]
    ours, theirs = selected(name, old, range(TASKS)), selected(name, old, order)
    index = [i for i in order if i < ours.tasks]
    for k in range(3):
        tasks = source(MEASURED + k, dimensions=4)
        a = step(ours, tasks)
        with drawn_for(order, tasks_there):
            b = step(theirs, tasks.taken(index))
        if not equal(Update(a.shared, a.heads[index], None if a.weights is None else a.weights[index]), b):
            return False
    return True


def exact_absence(name: str, history: int, source: Source = problem) -> bool | None:
    """removing an unlabelled task gives the same step as never having had it; weights of a fixed sum are rescaled"""
    old = experienced(name, steps=history, source=source)
    if old.tasks == 1:
        return True
    if not knows_absent(old):  # an absent task is refused
        return False
    # A loss with a fixed number of arguments cannot be called without a task.
    if fixed(name) or (isinstance(old, Custom) and history):
        return None
    for absent in (1, 2):
        left = [i for i in range(TASKS) if i != absent]
        present = torch.arange(TASKS) != absent
        ours, theirs = selected(name, old, range(TASKS)), selected(name, old, left)
        for k in range(3):
            tasks = source(MEASURED + k, dimensions=4)
            a = step(ours, tasks, present)
            with drawn_for(left, TASKS):
                b = step(theirs, tasks.taken(left))
            weights = None if a.weights is None else a.weights[left]
            # An absent task's head must get no gradient, not even from a regulariser.
            if a.heads[absent].any() or not equal(Update(a.shared, a.heads[left], weights), b):
                return False
    return True


def random(name: str, history: int, source: Source = problem) -> bool:
    """draws random numbers"""
    one, two = make(name, seed=0), make(name, seed=1)
    problems = [source(MEASURED + seed, dimensions=4) for seed in range(6)]
    return any(not torch.equal(step(one, tasks).shared, step(two, tasks).shared) for tasks in problems)


# In the order of the pages. A property returns None if it cannot be measured for a method.
PROPERTIES: Mapping[str, Callable[..., bool | None]] = {
    f.__name__: f
    for f in (
        scale_free,
        task_scale_free,
        linear,
        non_conflicting,
        stationary,
        unanimous,
        permutation,
        exact_absence,
        random,
    )
}


def verdicts(name: str, source: Source = problem) -> tuple[dict[str, bool | None], dict[str, bool | None]]:
    """Which of `PROPERTIES` hold in a method's first step, and after a history."""
    first = {key: holds(name, 0, source) for key, holds in PROPERTIES.items()}
    old = experienced(name, source=source)
    # Without a memory every step is like the first. A user's module may keep its memory in a plain attribute.
    if not (old.memory() or isinstance(old, Custom)):
        return first, first
    return first, {key: holds(name, HISTORY, source) for key, holds in PROPERTIES.items()}
