"""A method's author writes what the method needs: short signatures, one hook for heads, few frames."""

import copy
import traceback
from pathlib import Path

import pytest
import torch
from loops import METHODS, TASKS, Loop, batch
from torch import nn

import mtl
from mtl.engine.accumulate import accumulate
from mtl.engine.backward import gradients
from mtl.losses import (
    FAMO,
    ConsMTL,
    Equal,
    GradDrop,
    GramianWeighting,
    JacobianAggregation,
    LossWeighting,
    PCGrad,
    RepMTL,
    signatures,
)
from mtl.losses.base import times
from mtl.losses.hooks import HOOKS, defines


class Short(LossWeighting):
    def forward(self, losses):
        return losses.square().sum()


class Full(LossWeighting):
    def forward(self, losses, present=None):
        return losses.square().sum()


class ShortGramian(GramianWeighting):
    def weights(self, gramian):
        return 1 / gramian.diagonal().sqrt()


class FullGramian(GramianWeighting):
    def weights(self, gramian, present=None, losses=None):
        assert losses is not None
        return 1 / gramian.diagonal().sqrt()


class ShortJacobian(JacobianAggregation):
    def aggregate(self, jacobian):
        return jacobian.median(0).values


class FullJacobian(JacobianAggregation):
    def aggregate(self, jacobian, present=None, losses=None, features=None):
        assert losses is not None and features is None
        return jacobian.median(0).values


class Open(GramianWeighting):
    def weights(self, gramian, **facts):
        assert set(facts) == {"present", "losses"}
        return 1 / gramian.diagonal().sqrt()


class OnlyLosses(GramianWeighting):
    def weights(self, gramian, *, losses):
        return losses / gramian.diagonal().sqrt() / losses


def step_of(loop):
    return mtl.Step(loop.strategy, loop.optimizer, loop.net.trunk, loop.net.heads)


def forward_of(loop, x, y):
    return lambda part: mtl.Losses(*loop.net(x[part], y[part], loop.strategy.views))


PAIRS = [(Short, Full), (ShortGramian, FullGramian), (ShortJacobian, FullJacobian), (Open, FullGramian),
         (OnlyLosses, FullGramian)]  # fmt: skip


@pytest.mark.parametrize(("short", "full"), PAIRS)
def test_a_method_takes_what_it_reads(short, full):
    one, other = Loop(short(TASKS).double()), Loop(full(TASKS).double())
    for k in range(2):
        for loop in (one, other):
            step_of(loop)(forward_of(loop, *batch(k)), 12, torch.ones(12, TASKS, dtype=torch.bool))
    torch.testing.assert_close(one.numbers(), other.numbers(), rtol=1e-12, atol=1e-12)


RULES = [(Short, "forward"), (ShortGramian, "weights"), (ShortJacobian, "aggregate"), (OnlyLosses, "weights")]


@pytest.mark.parametrize(("kind", "rule"), RULES)
def test_an_absent_task_is_refused_where_the_method_cannot_know(kind, rule):
    loop = Loop(kind(["a", "b", "c"]).double())
    text = rf"^present: a batch lacks labels of task b, and {kind.__name__}.{rule} takes no argument `present`"
    with pytest.raises(ValueError, match=text):
        loop.fill(0, present=[True, False, True])
    labelled = torch.ones(12, TASKS, dtype=torch.bool)
    labelled[:, 1] = False
    with pytest.raises(ValueError, match=text):
        step_of(loop)(forward_of(loop, *batch(0)), 12, labelled)
    assert all(p.grad is None for p in loop.net.parameters())
    loop.fill(0, present=[True] * TASKS)


def test_flags_that_the_host_cannot_read_may_mark_an_absent_task(monkeypatch):
    monkeypatch.setattr(signatures, "host", lambda flags: None)  # as on a GPU
    with pytest.raises(ValueError, match=r"^present: a batch may lack labels of a task, and ShortGramian.weights"):
        Loop(ShortGramian(TASKS).double()).fill(0, present=[True] * TASKS)
    Loop(ShortGramian(TASKS).double()).fill(0)


def test_a_regulariser_that_cannot_know_is_refused():
    class Pulls(Equal):
        def regulariser(self, losses):
            return sum(losses)

    loop = Loop(Pulls(TASKS).double())
    loop.fill(0)
    other = Loop("equal")
    other.fill(0)
    torch.testing.assert_close(loop.gradients(), [2 * g for g in other.gradients()])
    with pytest.raises(ValueError, match=r"^present: .*Pulls.regulariser takes no argument `present`"):
        loop.fill(0, present=[True, False, True])


def test_a_regulariser_goes_with_any_family():
    class Pulls(PCGrad):
        def regulariser(self, losses, features, present=None):
            assert features is not None
            return sum(losses)

    loop, plain, equal = Loop(Pulls(TASKS).double()), Loop("pcgrad"), Loop("equal")
    for one in (loop, plain, equal):
        one.strategy.epoch_start(0, 1, 0)
        info = one.fill(0)
        if one is loop:
            norm = info.norm
    found, sums = loop.gradients(), [p + e for p, e in zip(plain.gradients(), equal.gradients(), strict=True)]
    torch.testing.assert_close(found, sums, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norm, nn.utils.get_total_norm(found[:2]))


def test_short_hooks():
    class Steps(Equal):
        seen = ()

        def after_step(self, losses):
            self.seen = (*self.seen, "after")

        def look_ahead(self, losses_of, parameters, lr):
            self.seen = (*self.seen, "ahead")

    loop = Loop(Steps(["a", "b", "c"]).double())
    labelled = torch.ones(12, TASKS, dtype=torch.bool)
    step_of(loop)(forward_of(loop, *batch(0)), 12, labelled)
    loop.strategy.after_step([1.0, 2.0, 3.0])
    loop.strategy.after_step(losses=[1.0, 2.0, 3.0], present=None)
    assert loop.strategy.seen == ("ahead", "after", "after", "after")
    labelled[:, 2] = False
    with pytest.raises(ValueError, match=r"^present: a batch lacks labels of task c, and Steps.look_ahead takes"):
        step_of(loop)(forward_of(loop, *batch(1)), 12, labelled)
    with pytest.raises(ValueError, match=r"^present: a batch lacks labels of task a, and Steps.after_step takes"):
        loop.strategy.after_step([1.0, 2.0, 3.0], [False, True, True])


def test_an_argument_that_nobody_gives_is_refused_at_once():
    class Wants(GramianWeighting):
        def weights(self, gramian, jacobian, losses=None):
            return gramian.diagonal()

    with pytest.raises(TypeError, match=r"Wants.weights: its argument `jacobian` is unknown; it may take present, los"):
        Wants(2)

    class Options(GramianWeighting):
        def weights(self, gramian, power=2):
            return gramian.diagonal() ** power

    Loop(Options(TASKS).double()).fill(0)


# -------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_heads_follow_the_methods_own_choice(scale):
    class Chooses(ShortGramian):
        def head_gradients(self, own):
            return times(own, torch.tensor([1.0, 2.0, 3.0]))

    class Adds(ShortGramian):
        def head_gradients(self, own, weights, heads):
            return [[g + w * p for g, p in zip(*row, strict=True)] for w, *row in zip(weights, own, heads, strict=True)]

    plain = Loop(ShortGramian(TASKS).double())
    weights = plain.fill(0).weights
    factor = scale or 1.0
    for kind in (Chooses, Adds):
        loop = Loop(kind(TASKS).double())
        loop.fill(0, scale=scale)
        for i, (ours, theirs) in enumerate(zip(loop.net.heads, plain.net.heads, strict=True)):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                expected = (i + 1) * q.grad if kind is Chooses else q.grad + weights[i] * p
                torch.testing.assert_close(p.grad, factor * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["imtl", "db_mtl", "consmtl"])
def test_a_switch_replaces_the_methods_own_choice(name):
    """heads=own means what it says, whatever the method does with its heads."""
    plain, loop = Loop("equal"), Loop(name)
    plain.fill(0)
    loop.fill(0, switches=mtl.Switches(heads="own"))
    for p, q in zip(loop.net.heads.parameters(), plain.net.heads.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_which_hooks_a_method_defines():
    own = (*HOOKS, "regulariser", "head_gradients")
    found = {kind: {hook for hook in own if defines(kind(2), hook)} for kind in (Equal, FAMO, RepMTL, ConsMTL)}
    assert found == {Equal: set(), FAMO: {"after_step"}, RepMTL: {"regulariser"}, ConsMTL: {"head_gradients"}}


# --------------------------------------------------------------------------------------------------------- two halves


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_found_before_any_is_written(name, monkeypatch):
    """Both halves, one after the other, are `mtl.backward`; the first leaves the model as it is."""
    halves, whole = Loop(name), Loop(name)

    def by_halves(*args, **options):
        found = gradients(*args, **options)
        assert all(p.grad is None for p in halves.net.parameters())
        return accumulate(found)

    whole.fill(0)
    monkeypatch.setattr(mtl, "backward", by_halves, raising=False)
    halves.fill(0)
    torch.testing.assert_close(halves.gradients(), whole.gradients(), rtol=0, atol=0)


def ours() -> list[str]:
    """The functions of this package that are under way."""
    package = Path(mtl.__file__).parent
    return [frame.name for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(package)]


class ForwardFrames(Equal):
    def forward(self, losses, present=None):
        self.frames = ours()
        return super().forward(losses, present)


class WeightsFrames(PCGrad):
    def weights(self, gramian, present=None):
        self.frames = ours()
        return super().weights(gramian, present)


class AggregateFrames(GradDrop):
    def aggregate(self, jacobian, present=None, features=None):
        self.frames = ours()
        return super().aggregate(jacobian, present, features)


@pytest.mark.parametrize("kind", [ForwardFrames, WeightsFrames, AggregateFrames])
def test_from_a_step_to_the_method_there_is_one_function(kind):
    loop = Loop(kind(TASKS).double())
    step_of(loop)(forward_of(loop, *batch(0)), 12)
    assert loop.strategy.frames == ["__call__", "gradients"]
    loop.fill(1)
    assert loop.strategy.frames == ["backward", "gradients"]


def test_a_copy_keeps_to_itself_or_to_all():
    """A process group can be neither copied nor pickled; a copy that is told nothing is as a new strategy."""
    strategy = Equal(2)
    for group, copied in (("auto", "auto"), (None, None), (object(), "auto")):
        strategy.group = group
        assert copy.deepcopy(strategy).group == copied
