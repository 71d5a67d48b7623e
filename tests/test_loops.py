"""mtl.backward in strangers' loops: the right numbers, or an error that names the argument and the cure."""

import copy
import io
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from loops import METHODS, TASKS, Loop, batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mtl
from mtl.certify.problem import WIDTH, make
from mtl.losses import Equal, Statistics, hooks
from mtl.losses.extra import unpack
from mtl.losses.hooks import HINT, LONG, PATIENCE, defines

close = torch.testing.assert_close


def network(seed: int = 0, tasks: int = 2) -> tuple[nn.Module, list[nn.Module], torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(4, 6), [nn.Linear(6, 1) for _ in range(tasks)], torch.randn(8, 4)


def errors(f: torch.Tensor, heads) -> list[torch.Tensor]:
    return [(h(f) - i - 1).square().mean() for i, h in enumerate(heads)]


def fresh(name: str, tasks: int = 2, **options):
    return getattr(mtl.losses, name)(tasks=tasks, **options)


# ----------------------------------------------------------------------------------- gradients as autograd writes them


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))
        self.added = nn.Parameter(torch.zeros(4))

    def forward(self, f):
        return (
            torch.einsum("nf,efk->nek", f, self.weight).square().mean() + self.added.sum().square() + self.added.sum()
        )


@pytest.mark.parametrize("name", ["Equal", "Uncertainty", "PCGrad", "GradDrop", "IMTL", "DBMTL"])
def test_fused_and_plain_optimizers_agree(name):
    """A head whose gradient autograd leaves in another layout, and a parameter whose gradient is expanded."""

    def train(fused):
        body, (head, *_), x = network()
        heads, strategy = [Experts(), head], fresh(name)
        everything = [p for m in (body, *heads, strategy) for p in m.parameters()]
        optimizer = torch.optim.SGD(everything, lr=0.05, momentum=0.9, fused=fused)
        for _ in range(3):
            f = body(x).tanh()
            optimizer.zero_grad()
            mtl.backward([heads[0](f), heads[1](f).square().mean()], strategy, body, heads)
            optimizer.step()
        return everything

    for a, b in zip(train(False), train(True), strict=True):
        close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_every_gradient_has_its_parameters_strides_and_memory_of_its_own(name):
    loop = Loop(name)
    loop.net.trunk.weight = nn.Parameter(loop.net.trunk.weight.detach().T.contiguous().T)  # column by column
    loop.fill(0)
    found = [p for p in (*loop.net.parameters(), *loop.strategy.parameters()) if p.grad is not None]
    strides = lambda t: [s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1]  # noqa: E731
    assert all(strides(p.grad) == strides(p) for p in found)
    assert len({p.grad.untyped_storage().data_ptr() for p in found}) == len(found) >= 8
    assert all(p.grad.untyped_storage().nbytes() == p.numel() * p.element_size() for p in found)


# -------------------------------------------------------------------------------------------------------- arguments


def accepted() -> dict:
    def by_name(losses, strategy, body, heads):
        named = mtl.losses.PCGrad(tasks=["a", "b"])
        return mtl.backward({"b": losses[1], "a": losses[0]}, named, body, {"b": heads[1], "a": heads[0]})

    return {
        "modules": lambda x, s, body, heads: mtl.backward(x, s, body, heads),
        "module list": lambda x, s, body, heads: mtl.backward(x, s, body, nn.ModuleList(heads)),
        "named": lambda x, s, body, heads: mtl.backward(
            x, s, body.named_parameters(), [h.named_parameters() for h in heads]
        ),
        "by name": by_name,
        "duplicates": lambda x, s, body, heads: mtl.backward(x, s, [*body.parameters(), body, body.bias], heads),
        "everything shared": lambda x, s, body, heads: mtl.backward(
            x, s, [*body.parameters(), *heads[0].parameters(), *heads[1].parameters()], heads
        ),
        "shape (1,)": lambda x, s, body, heads: mtl.backward([loss[None] for loss in x], s, body, heads),
        "one tensor": lambda x, s, body, heads: mtl.backward(torch.stack(x), s, body, heads),
        "column": lambda x, s, body, heads: mtl.backward(torch.stack(x)[:, None], s, body, heads),
        "tuple": lambda x, s, body, heads: mtl.backward(tuple(x), s, body, heads),
        "generator": lambda x, s, body, heads: mtl.backward(iter(x), s, body, (h for h in heads)),
        "present list": lambda x, s, body, heads: mtl.backward(x, s, body, heads, [True, True]),
        "present numbers": lambda x, s, body, heads: mtl.backward(x, s, body, heads, torch.tensor([1, 1])),
    }


@pytest.mark.parametrize("form", accepted())
def test_what_can_be_understood_is_accepted(form):
    """The same gradients as from lists of parameters."""
    found = []
    for call in (accepted()[form], lambda x, s, body, heads: mtl.backward(x, s, list(body.parameters()), heads)):
        body, heads, x = network()
        call(errors(body(x).tanh(), heads), fresh("PCGrad"), body, heads)
        found.append([p.grad for m in (body, *heads) for p in m.parameters()])
    close(found[0], found[1])


REFUSED = {
    "heads in the wrong order": (lambda c: c.update(heads=c["heads"][::-1]), r"heads\[0\].*task order"),
    "one batch of losses": (lambda c: c.update(losses=[torch.ones(8, requires_grad=True)] * 2), r"losses\[0\].*\(8,\)"),
    "no tensor": (lambda c: c.update(losses=[1.5, 2.0]), r"losses\[0\].*float"),
    "whole numbers": (lambda c: c.update(losses=[torch.tensor(1)] * 2), r"losses\[0\].*int64"),
    "three losses": (lambda c: c.update(losses=[*c["losses"], c["losses"][0]]), r"losses: 3"),
    "names": (lambda c: c.update(losses={"a": c["losses"][0], "b": c["losses"][1]}), r"losses: keys a, b"),
    "present of three": (lambda c: c.update(present=[True] * 3), r"present: shape \(3,\)"),
    "present as shares": (lambda c: c.update(present=[0.5, 1.0]), r"present: .*float32"),
    "used generator": (lambda c: c.update(shared=iter(())), r"shared: no parameters; a generator"),
    "rows of a weight": (lambda c: c.update(shared=list(c["shared"].weight)), r"shared: .*computed"),
    "names as shared": (lambda c: c.update(shared=["weight"]), r"shared: 'weight'"),
    "a part of the trunk": (lambda c: c.update(shared=c["shared"].weight), r"shared: .*neither in shared nor in heads"),
    "one head": (lambda c: c.update(heads=c["heads"][0]), r"heads: 1 collections"),
    "flat heads": (
        lambda c: c.update(heads=[p for h in c["heads"] for p in h.parameters()]),
        r"heads: 4 collections.*2 tasks",
    ),
    "a head twice": (lambda c: c.update(heads=[c["heads"][0]] * 2), r"heads\[0\] and heads\[1\] hold the same"),
    "scale": (lambda c: c.update(scale="dynamic"), r"scale: a str"),
    "scale of 0": (lambda c: c.update(scale=0.0), r"scale: 0.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_rest_is_refused_with_the_arguments_name(what):
    body, heads, x = network()
    change, message = REFUSED[what]
    call = {"losses": errors(body(x).tanh(), heads), "strategy": fresh("PCGrad"), "shared": body, "heads": heads}
    change(call)
    with pytest.raises((ValueError, TypeError), match=message):
        mtl.backward(**call)
    assert all(p.grad is None for m in (body, *heads) for p in m.parameters())


@pytest.mark.parametrize("name", ["PCGrad", "CAGrad", "UPGrad", "GradNorm", "GradDrop"])
def test_a_tied_weight_is_shared(name):
    """An output layer that is the embedding itself: the same as listing it in shared only, and counted once."""
    found = []
    for tied in (True, False):
        torch.manual_seed(0)
        embedding, encoder, classifier = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        x = torch.randint(0, 20, (8,))
        f = encoder(embedding(x)).tanh()
        losses = [
            nn.functional.cross_entropy(f @ embedding.weight.T, x),
            nn.functional.cross_entropy(classifier(f), x % 3),
        ]
        heads = [[embedding.weight] if tied else [], classifier]
        mtl.backward(losses, fresh(name), [embedding, encoder], heads)
        found.append([p.grad for m in (embedding, encoder, classifier) for p in m.parameters()])
    close(found[0], found[1])


@pytest.mark.parametrize("strategy", ["pcgrad", mtl.losses.PCGrad, [1.0, 2.0], None])
def test_a_strategy_is_an_instance(strategy):
    body, heads, x = network()
    with pytest.raises(TypeError, match=r"strategy: .* is no strategy; give one of mtl.losses"):
        mtl.backward(errors(body(x), heads), strategy, body, heads)


def test_none_is_no_loss():
    body, heads, x = network()
    with pytest.raises(TypeError, match=r"losses\[1\].*NoneType.*torch.zeros\(\(\)\).*present="):
        mtl.backward([errors(body(x), heads)[0], None], fresh("PCGrad"), body, heads, [True, False])


def test_it_is_said_that_gradients_are_off():
    for off in (torch.no_grad, torch.inference_mode):
        body, heads, x = network()
        for name in ("Equal", "PCGrad"):
            with pytest.raises(ValueError, match=r"losses: gradients are switched off"), off():
                mtl.backward(errors(body(x), heads), fresh(name), body, heads)
            with pytest.raises(ValueError, match=r"losses: gradients are switched off"), off():
                mtl.backward(torch.stack(errors(body(x), heads)), fresh(name), body, heads)


@pytest.mark.parametrize("name", ["Equal", "Uncertainty", "PCGrad", "GradDrop", "RotoGrad", "RepMTL"])
def test_losses_with_a_graph_may_be_given_under_no_grad(name):
    """As to Tensor.backward."""
    found = []
    for mode in (torch.no_grad, torch.enable_grad):
        body, heads, x = network()
        strategy, f = fresh(name, **({"features": 6} if name == "RotoGrad" else {})), body(x).tanh()
        losses = errors(strategy.views(f)[0], heads)
        strategy.epoch_start(0, 1, 3)
        with mode():
            mtl.backward(losses, strategy, body, heads, features=f)
        found.append([p.grad for m in (body, *heads, strategy) for p in m.parameters()])
    close(found[0], found[1], rtol=0, atol=0)
    assert body.weight.grad.any()


def test_tasks_may_be_numbered():
    found = []
    for tasks in (2, np.int64(2), [0, 1], np.arange(2), ["0", "1"], torch.tensor(2)):
        body, heads, x = network()
        losses = errors(body(x).tanh(), heads)
        named = {np.int64(1): losses[1], 0: losses[0]}
        strategy = mtl.losses.PCGrad(tasks)
        strategy.epoch_start(0, 1, 3)
        mtl.backward(named, strategy, body, {1: heads[1], 0: heads[0]}, {0: True, 1: True})
        found.append(body.weight.grad)
    close(found, [found[0]] * len(found), rtol=0, atol=0)
    for tasks in (2.0, None, torch.tensor(2.0)):
        with pytest.raises(ValueError, match=r"tasks: .*neither a whole number nor a list of names"):
            mtl.losses.PCGrad(tasks)


# ------------------------------------------------------------------------------------------ what a loss does not reach


def detached(body, heads, x):
    return errors(body(x).detach(), heads)


def without_gradient(body, heads, x):
    with torch.no_grad():
        f = body(x)
    return errors(f, heads)


def one_detached(body, heads, x):
    f = body(x)
    return [errors(f, heads)[0], errors(f.detach(), heads)[1]]


def reentrant(body, heads, x):
    return errors(checkpoint(body, x.requires_grad_(), use_reentrant=True).tanh(), heads)


@pytest.mark.parametrize("name", ["Equal", "Uncertainty", "PCGrad", "GradDrop", "NashMTL"])
@pytest.mark.parametrize("how", [detached, without_gradient, one_detached, reentrant])
def test_a_loss_that_reaches_no_shared_parameter_is_an_error(how, name):
    """Except behind a re-entrant checkpoint for loss weighting, whose single backward pass reaches it."""
    body, heads, x = network()
    losses = how(body, heads, x)
    if how is reentrant and name in ("Equal", "Uncertainty"):
        mtl.backward(losses, fresh(name), body, heads)
        assert body.weight.grad.norm() > 0.1
        return
    match = "use_reentrant=False" if how is reentrant else r"losses\[[01]\].*reaches no parameter of shared.*detached"
    with pytest.raises(ValueError, match=match):
        mtl.backward(losses, fresh(name), body, heads)


def test_it_is_noticed_in_every_step_of_a_gradient_method():
    body, heads, x = network()
    strategy = fresh("PCGrad")
    for _ in range(5):
        mtl.backward(errors(body(x), heads), strategy, body, heads)
    with pytest.raises(ValueError, match=r"losses\[1\]"):
        mtl.backward(one_detached(body, heads, x), strategy, body, heads)


def test_a_loss_without_a_graph_must_be_absent():
    body, heads, x = network()
    losses = [errors(body(x), heads)[0], torch.zeros(())]
    with pytest.raises(ValueError, match=r"losses\[1\].*present="):
        mtl.backward(losses, fresh("Equal"), body, heads)
    mtl.backward(losses, fresh("PCGrad"), body, heads, present=[True, False])
    assert body.weight.grad.any() and heads[1].weight.grad is None


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("absent", ["0/0", "slope of a root at 0", "inf"])
def test_the_loss_of_an_absent_task_may_be_anything(name, absent):
    """A mean over no label is NaN, and so is 0 times the slope of a root at 0: neither may reach the trunk."""
    found = []
    change = {
        "0/0": lambda loss: loss * 0 / (loss.detach() * 0),
        "slope of a root at 0": lambda loss: (loss * 0).sqrt(),
        "inf": lambda loss: loss * float("inf"),
    }
    for edit in (lambda loss: loss, change[absent]):
        loop = Loop(name)

        def losses(x, y, right=loop.losses, edit=edit):
            values, features = right(x, y)
            return [edit(value) if i == 1 else value for i, value in enumerate(values)], features

        loop.losses = losses
        if defines(loop.strategy, "look_ahead"):
            pytest.skip("look_ahead is told of absent tasks by itself")
        loop.fill(0, present=[True, False, True])
        found.append(loop.gradients())
    close(found[1], found[0], rtol=1e-10, atol=1e-14)


def test_a_task_may_use_a_part_of_the_trunk():
    body, heads, x = network()
    deep = nn.Linear(6, 6)
    f = body(x).tanh()
    mtl.backward([errors(f, heads)[0], (heads[1](deep(f))).square().mean()], fresh("PCGrad"), [body, deep], heads)
    assert body.weight.grad.any() and deep.weight.grad.any()


def test_a_head_that_another_task_uses_is_refused():
    body, heads, x = network()
    f = body(x)
    losses = [heads[0](f).square().mean(), (heads[1](f) + heads[0](f)).square().mean()]
    with pytest.raises(ValueError, match=r"heads\[0\].*also reached by the loss of task 1"):
        mtl.backward(losses, fresh("PCGrad"), body, heads)


@pytest.mark.parametrize("name", METHODS)
def test_with_a_frozen_trunk_heads_get_their_own_gradients(name):
    loop = Loop(name)
    loop.net.trunk.requires_grad_(False)
    if loop.strategy.gradients == "features" or name in ("rep_mtl", "consmtl"):
        pytest.skip("takes gradients of the features, which a frozen trunk does not have")
    loop.fill(0)
    assert all(p.grad is None for p in loop.net.trunk.parameters())
    assert all(p.grad.isfinite().all() and p.grad.any() for p in loop.net.heads.parameters())


# ------------------------------------------------------------------------- parameters behind custom autograd functions


class Hides(torch.autograd.Function):
    """As reversible blocks and some kinds of checkpointing: the module runs again in the backward pass."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module, ctx.x = module, x.detach()
        return module(ctx.x).detach()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.x.clone().requires_grad_()
            y = ctx.module(x)
        torch.autograd.backward(y, g)
        return x.grad, None


class Through(torch.autograd.Function):
    """A custom function without parameters, such as a straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def three_layers():
    torch.manual_seed(0)
    return nn.Linear(4, 5), nn.Linear(5, 6), [nn.Linear(6, 1), nn.Linear(6, 1)], torch.randn(8, 4)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_behind_a_custom_function_get_the_same_gradient(name):
    """Of the trunk, with the first layer before them in the graph, and of a head."""
    found = []
    for hide in (Hides.apply, lambda x, module: module(x)):
        strategy = make(name)
        first, second, heads, x = three_layers()
        modules = nn.ModuleList([first, second, *heads]).double()
        second = nn.Sequential(second, nn.Linear(6, WIDTH).double())
        heads = [nn.Linear(WIDTH, 1).double() for _ in range(TASKS)]
        modules = nn.ModuleList([first, second, *heads])
        for p in modules.parameters():
            nn.init.constant_(p, 0.1) if p.dim() == 1 else nn.init.normal_(
                p, generator=torch.Generator().manual_seed(7)
            )
            p.grad = torch.ones_like(p)
        if defines(strategy, "look_ahead") or strategy.samples > 1:
            pytest.skip("covered by the others")
        f = hide(first(x.double()).tanh(), second).tanh()
        views = strategy.views(f)
        predictions = [hide(v, h) if i == 1 else h(v) for i, (v, h) in enumerate(zip(views, heads, strict=True))]
        losses = [(p - i - 1).square().mean() for i, p in enumerate(predictions)]
        try:
            mtl.backward(losses, strategy, [first, second], heads, features=f)
        except ValueError as error:
            assert name in ("rep_mtl", "consmtl") and "takes second derivatives" in str(error)
            assert all((p.grad == 1).all() for p in modules.parameters()) or name == "consmtl"
            return
        found.append([p.grad for p in modules.parameters()])
    close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["Equal", "Uncertainty", "CAGrad", "GradDrop"])
def test_a_trunk_that_is_all_hidden_is_right_or_refused(name):
    """No parameter is before it in the graph, so that a gradient of a single task does not run it."""
    body, heads, x = network()
    losses = errors(Hides.apply(x.requires_grad_(), body).tanh(), heads)
    if name in ("Equal", "Uncertainty"):
        mtl.backward(losses, fresh(name), body, heads)
        found = body.weight.grad.clone()
        body.weight.grad = None
        mtl.backward(errors(body(x).tanh(), heads), fresh(name), body, heads)
        close(found, body.weight.grad)
        return
    with pytest.raises(ValueError, match=r"losses\[0\] .*custom autograd function Hides hides a parameter"):
        mtl.backward(losses, fresh(name), body, heads)
    assert all(p.grad is None for m in (body, *heads) for p in m.parameters())


def test_a_layer_that_is_beside_the_others_and_hidden_is_refused():
    body, heads, x = network()
    aside = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"custom autograd function Hides hides a parameter of shape \(6, 4\)"):
        f = body(x) + Hides.apply(x.clone().requires_grad_(), aside)
        mtl.backward(errors(f, heads), fresh("CAGrad"), [body, aside], heads)
    with pytest.raises(ValueError, match=r"shared: .*neither in shared nor in heads"):
        f = Hides.apply(body(x), nn.Linear(6, 6))
        mtl.backward(errors(f, heads), fresh("CAGrad"), body, heads)


@pytest.mark.parametrize("name", ["Equal", "CAGrad"])
def test_a_custom_function_does_not_hide_detached_features(name):
    body, heads, x = network()
    losses = errors(Through.apply(body(x).detach().requires_grad_()), heads)
    with pytest.raises(ValueError, match=r"losses.*reach.* no parameter of shared"):
        mtl.backward(losses, fresh(name), body, heads)
    with pytest.raises(ValueError, match=r"heads\[0\].*task order|heads\[1\]: its parameter"):
        mtl.backward(errors(Through.apply(body(x)), heads), fresh("CAGrad"), body, heads[::-1])


def test_checks_leave_gradients_alone():
    """Their passes run custom functions, too."""
    body, heads, x = network()
    hidden = nn.Linear(6, 6)
    f = Hides.apply(body(x).tanh(), hidden)
    losses = [heads[0](f).square().mean(), heads[1](f).square().mean() + heads[0](f).sum()]
    with pytest.raises(ValueError, match=r"heads\[0\]"):
        mtl.backward(losses, fresh("CAGrad"), [body, hidden, *heads], heads[::-1])
    assert all(p.grad is None for m in (body, hidden, *heads) for p in m.parameters())


# ---------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_scale_changes_nothing_but_the_scale(name):
    plain, scaled = Loop(name), Loop(name, scale=1024.0)
    for step in range(2):
        a, b = plain.fill(step), scaled.fill(step)
        close([g / 1024 for g in scaled.gradients()], plain.gradients(), rtol=1e-9, atol=1e-12)
        close(b.norm, a.norm, rtol=1e-9, atol=0)
        for p in (*scaled.net.parameters(), *scaled.strategy.parameters()):
            p.grad = None if p.grad is None else p.grad / 1024  # as GradScaler.unscale_ does it
        plain.finish(step)
        scaled.finish(step)
    close(scaled.numbers(), plain.numbers(), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["uncertainty", "fairgrad", "db_mtl", "famo", "rotograd", "rlw", "pcgrad", "gradvac", "graddrop"]
)
@pytest.mark.parametrize("first", [False, True])
def test_a_grad_scaler_skips_an_overflow_and_goes_on_as_if_it_had_not_been(name, first):
    """The step that overflows leaves model, method and optimizer as they were, and its draws are drawn again."""

    def train(overflow):
        loop, scaler = Loop(name), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in ("overflow", 0, 1) if first else (0, 1, "overflow", 2, 3):
            if step == "overflow":
                if not overflow:
                    continue
                loop.fill(7, factors=(1.0, float("inf"), 1.0), scale=scaler)
            else:
                loop.fill(step, scale=scaler)
            scaler.step(loop.optimizer)
            scaler.update()
            loop.look_back(7 if step == "overflow" else step)
        return loop, scaler.get_scale()

    (skipped, low), (straight, high) = train(True), train(False)
    close(skipped.numbers(), straight.numbers(), rtol=1e-9, atol=1e-12, equal_nan=True)
    assert low == high / 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_leaves_the_methods_memory_untouched(name, value):
    """Its gradient is not finite either, so that a GradScaler sees it; the next step is."""
    loop = Loop(name)
    for step in range(2):
        loop.fill(step)
        loop.finish(step)
    before = {k: v.clone() for k, v in loop.strategy.named_buffers()}
    if defines(loop.strategy, "look_ahead"):
        pytest.skip("looks ahead before the step")
    loop.fill(2, factors=(1.0, value, 1.0))
    assert not all(g.isfinite().all() for g in loop.gradients())
    close(dict(loop.strategy.named_buffers()), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["DBMTL", "MoCo", "ExcessMTL", "GradNorm", "FAMO"])
def test_so_it_is_in_the_first_step(name):
    loop = Loop(fresh(name, TASKS).double())
    loop.fill(0, factors=(1.0, float("inf"), 1.0))
    again, straight = Loop(fresh(name, TASKS).double()), None
    if defines(loop.strategy, "after_step"):
        loop.strategy.after_step(torch.ones(TASKS, dtype=torch.float64))
    loop.fill(1)
    again.fill(1)
    straight = again.gradients()
    close(loop.gradients(), straight)


@pytest.mark.parametrize("name", ["PCGrad", "NashMTL", "Uncertainty", "UPGrad"])
def test_inside_autocast_the_methods_own_products_are_not_rounded(name):
    found = []
    for inside in (False, True):
        body, heads, x = network()
        losses = errors(body(x).tanh(), heads)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            mtl.backward(losses, fresh(name), body, heads)
        found.append([p.grad for m in (body, *heads) for p in m.parameters()])
    close(found[0], found[1], rtol=0, atol=0)


def test_half_precision_losses_are_computed_with_in_single_precision():
    """A loss of 1e-7 in half precision times anything is 0, and so is its floor."""
    found = []
    for dtype in (torch.float32, torch.float16):
        body, heads, x = network()
        losses = [(loss * s).to(dtype) for loss, s in zip(errors(body(x).tanh(), heads), (1.0, 1e-3), strict=True)]
        found.append(mtl.backward(losses, fresh("GLS"), body, heads).weights)
    close(found[0], found[1], rtol=1e-2, atol=0)


# ------------------------------------------------------------------------------------------------ kinds of parameters


@pytest.mark.parametrize("name", ["PCGrad", "MGDA", "NashMTL", "DBMTL"])
def test_complex_parameters_are_two_real_ones(name):
    def run(split):
        torch.manual_seed(0)
        w, heads = torch.randn(4, 3, dtype=torch.complex128), [nn.Linear(3, 1).double() for _ in range(2)]
        x = torch.randn(8, 4, dtype=torch.float64)
        if split:
            parts = [nn.Parameter(w.real.clone()), nn.Parameter(w.imag.clone())]
            f = (x @ parts[0]).square() + (x @ parts[1]).square()
        else:
            parts = [nn.Parameter(w)]
            f = (x.to(w) @ parts[0]).abs().square()
        mtl.backward(errors(f, heads), fresh(name), parts, heads)
        return [p.grad for p in parts], [p.grad for h in heads for p in h.parameters()]

    (whole,), heads = run(False)
    (real, imaginary), same = run(True)
    close(whole.real, real)
    close(whole.imag, imaginary)
    close(heads, same)


@pytest.mark.parametrize("name", ["Equal", "PCGrad", "GradDrop"])
@pytest.mark.parametrize("shared", [True, False])
def test_sparse_embeddings(name, shared):
    """A sparse gradient has the numbers of a dense one, in the trunk and in a head."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding, heads, x = nn.Embedding(10, 6, sparse=sparse), [nn.Linear(6, 1), nn.Linear(6, 1)], torch.arange(5)
        body, strategy = nn.Linear(6, 6), fresh(name).double()
        strategy.epoch_start(0, 1, 3)
        f = body(embedding(x) if shared else torch.ones(5, 6))
        losses = errors(f, heads)
        if not shared:
            losses[0] = losses[0] + embedding(x).square().mean()
        mtl.backward(
            losses, strategy, [body, embedding] if shared else body, [[heads[0], embedding][: 2 - shared], heads[1]]
        )
        gradient = embedding.weight.grad
        found.append([gradient.to_dense() if gradient.is_sparse else gradient, body.weight.grad])
    close(found[0], found[1])


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_several_dtypes_in_any_order(first):
    """The Jacobian is as precise as its most precise parameter, whichever comes first."""
    found = []
    for order in (1, -1):
        torch.manual_seed(0)
        a, b, heads = nn.Parameter(torch.randn(4, 6).to(first)), nn.Parameter(torch.randn(6)), network()[1]
        f = (torch.randn(8, 4) @ a.float() + b).tanh()
        info = mtl.backward(errors(f, heads), fresh("CAGrad"), [a, b][::order], heads)
        assert a.grad.dtype == first and b.grad.dtype == torch.float32
        found.append([info.weights.float(), a.grad, b.grad])
    close(found[0], found[1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- hooks


def test_a_forgotten_hook_is_an_error_that_says_what_to_call(monkeypatch):
    monkeypatch.setattr(hooks, "LONG", PATIENCE)  # steps of a first epoch that never ends

    def loop(name, steps, **options):
        body, heads, x = network()
        strategy = fresh(name, **options)
        for _ in range(steps):
            mtl.backward(errors(body(x).tanh(), heads), strategy, body, heads)
        return strategy

    loop("FAMO", 1)
    for name, steps, said in [
        ("FAMO", 2, "strategy.after_step(losses)"),
        ("AutoLambda", 1, "strategy.look_ahead(losses_of, parameters, lr)"),
        ("MOML", 1, "strategy.look_ahead(losses_of, parameters, lr)"),
        ("RotoGrad", 1, "strategy.prepare(features)"),
        ("DWA", PATIENCE + 1, "strategy.epoch_end"),
        ("STCH", PATIENCE + 1, "strategy.epoch_end"),
        ("Annealed", PATIENCE + 1, "strategy.epoch_start(epoch, epochs)"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(said)):
            loop(name, steps)
        if steps > 1:
            loop(name, steps - 1)
    for name in ("MoDo", "SDMGrad"):
        with pytest.raises(ValueError, match=f"losses: {name} needs the losses of {fresh(name).samples} independent"):
            loop(name, 1)


def test_an_epoch_that_ended_in_silence_is_an_error():
    loop = Loop(fresh("DWA", TASKS).double())
    loop.strategy.epoch_start(0, 3)
    loop.fill(0)
    with pytest.raises(RuntimeError, match=r"DWA: epoch 0 ended without strategy.epoch_end"):
        loop.strategy.epoch_start(1, 3)


def test_methods_that_learn_from_epochs_work_with_epoch_end_alone():
    """As the README of the first release said."""
    body, heads, x = network()
    strategy = fresh("DWA")
    for epoch in range(3):
        for _ in range(30):
            info = mtl.backward(errors(body(x).tanh(), heads), strategy, body, heads)
        strategy.epoch_end(Statistics(torch.tensor([1.0, 1.0 - 0.3 * epoch])))
    assert info.weights[0] > info.weights[1]


def test_a_long_first_epoch_is_no_error_for_methods_that_need_its_end_alone():
    """They say after `HINT` steps what they wait for, and refuse after `LONG`; epoch_start is an answer, too."""
    strategy, heard = fresh("DWA"), fresh("DWA")
    body, heads, x = network()
    heard.epoch_start(0, 3)
    heard.calls.steps = strategy.calls.steps = HINT
    mtl.backward(errors(body(x), heads), heard, body, heads)
    with pytest.warns(UserWarning, match=r"DWA learns from epochs.*waits for strategy.epoch_end"):
        mtl.backward(errors(body(x), heads), strategy, body, heads)
    mtl.backward(errors(body(x), heads), strategy, body, heads)
    heard.calls.steps = strategy.calls.steps = LONG
    mtl.backward(errors(body(x), heads), heard, body, heads)
    with pytest.raises(RuntimeError, match=r"DWA learns from epochs.*first epoch is longer.*epoch_start"):
        mtl.backward(errors(body(x), heads), strategy, body, heads)


def test_an_epochs_end_alone_does_not_tell_the_progress():
    body, heads, x = network()
    strategy = mtl.losses.Annealed(2)
    strategy.epoch_end(Statistics(torch.ones(2)))
    with pytest.raises(RuntimeError, match=r"Annealed depends on epochs.*epoch_start"):
        for _ in range(PATIENCE + 1):
            mtl.backward(errors(body(x).tanh(), heads), strategy, body, heads)


def train(name, steps, own=True, every=1, change=None, optimizer=torch.optim.SGD):
    """Steps of a loop whose optimizer holds the strategy's parameters if `own`; it steps after `every` passes."""
    body, heads, x = network()
    strategy = fresh(name) if isinstance(name, str) else name
    known = [p for m in (body, *heads, *[strategy] * own) for p in m.parameters()]
    chosen = optimizer(known, lr=0.01)
    for step in range(steps):
        mtl.backward(errors(body(x).tanh(), heads), strategy, body, heads)
        if step % every == every - 1:
            chosen.step()
            chosen.zero_grad()
            if change:
                change(strategy)
    return strategy


@pytest.mark.parametrize("name", ["Uncertainty", "UncertaintySigma", "IMTL", "IMTLL", "LDCMTL"])
def test_a_methods_parameters_in_no_optimizer_are_an_error(name):
    train(name, PATIENCE, own=False)
    with pytest.raises(RuntimeError, match=rf"{name}: its parameter \w+ got .*add strategy.parameters\(\) to the opt"):
        train(name, PATIENCE + 2, own=False)
    train(name, PATIENCE + 2)


def test_parameters_that_rest_for_a_reason_are_none():
    train("Uncertainty", 4 * PATIENCE, own=False, every=4)  # accumulation: the model has made PATIENCE steps
    train("Uncertainty", 2 * PATIENCE, every=40)
    train(fresh("Uncertainty").requires_grad_(False), 2 * PATIENCE, own=False)

    def by_hand(strategy):
        strategy.log_variances.data -= 0.01 * strategy.log_variances.grad

    train("Uncertainty", 2 * PATIENCE, own=False, change=by_hand)
    copy.deepcopy(train("Uncertainty", 2, own=False))


@pytest.mark.parametrize("name", ["Uncertainty", "PCGrad", "IMTL"])
def test_a_module_may_hold_the_strategy(name):
    """Its parameters are the method's, not the model's, so the step is the same."""
    found = []
    for inside in (False, True):
        body, heads, x = network()
        strategy = fresh(name)
        losses = errors(body(x).tanh(), heads)
        own = [[strategy], [strategy]] if inside else [[], []]
        step = mtl.backward(losses, strategy, [body, *own[0]], [[h, *o] for h, o in zip(heads, own, strict=True)])
        found.append([step.norm, *(p.grad for m in (body, *heads, strategy) for p in m.parameters())])
    close(found[0], found[1], rtol=0, atol=0)
    if name == "Uncertainty":
        with pytest.raises(ValueError, match="shared: holds only the strategy's own parameters"):
            mtl.backward(errors(body(x), heads), strategy, strategy, heads)


def test_a_method_that_learns_from_each_step_names_the_cure_for_accumulation_and_closures():
    with pytest.raises(RuntimeError, match=r"FAMO .*no parameter has moved.*micro-batches: add up each task's losses"):
        train("FAMO", 2, every=2)
    with pytest.raises(RuntimeError, match=r"FAMO .*after every optimizer.step\(\).*LBFGS\) needs max_iter=1"):
        train("FAMO", 2)


@pytest.mark.parametrize("form", ["list", "floats", "dict", "numpy"])
def test_hooks_take_lists_and_numbers(form):
    forms = {
        "list": list,
        "floats": torch.Tensor.tolist,
        "dict": lambda v: {1: v[1], 0: v[0]},
        "numpy": lambda v: v.detach().numpy(),
    }
    make_form, values = forms[form], torch.tensor([1.0, 2.0])
    for name, call in {
        "FAMO": lambda s, v: s.after_step(v),
        "DWA": lambda s, v: [s.epoch_end(Statistics(v)), s.epoch_end(Statistics(losses=v, scores=v))],
    }.items():
        found = []
        for convert in (lambda v: v, make_form):
            body, heads, x = network()
            strategy = fresh(name)
            mtl.backward(errors(body(x), heads), strategy, body, heads)
            call(strategy, convert(values))
            found.append(dict(strategy.named_buffers()))
        close(found[0], found[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("losses", [torch.ones(2, 1), torch.ones(1), torch.ones(()), [[1.0, 2.0]], 1.0, [1.0], None])
def test_hooks_refuse_other_shapes(losses):
    body, heads, x = network()
    famo, stch, look = fresh("FAMO"), fresh("STCH"), fresh("AutoLambda")
    mtl.backward(errors(body(x), heads), famo, body, heads)
    for said, call in {
        r"after_step\(losses\): ": lambda: famo.after_step(losses),
        r"Statistics\(losses\): |epoch_end\(statistics\): ": lambda: stch.epoch_end(
            losses if losses is None else Statistics(losses)
        ),
        r"look_ahead\(losses_of\): ": lambda: look.look_ahead(lambda k: losses, list(body.parameters()), 0.1),
    }.items():
        with pytest.raises((ValueError, TypeError), match=said):
            call()
    assert famo.calls.waits


def test_look_ahead_takes_a_list_of_losses():
    found = []
    for convert in (torch.stack, list, lambda losses: {"1": losses[1], "0": losses[0]}):
        body, heads, x = network()
        strategy = fresh("MOML")
        half = lambda k, body=body, heads=heads, x=x: errors(body(x.chunk(2)[k]).tanh(), heads)  # noqa: E731
        strategy.look_ahead(lambda k, half=half, convert=convert: convert(half(k)), list(body.parameters()), 0.1)
        mtl.backward(errors(body(x), heads), strategy, body, heads)
        found.append(body.weight.grad)
    close(found[0], found[1])
    close(found[0], found[2])


def test_the_width_of_the_features_is_a_number():
    with pytest.raises(ValueError, match=r"prepare\(features\): a Tensor is no width"):
        fresh("RotoGrad").prepare(torch.ones(8, 6))


@pytest.mark.parametrize("name", ["RotoGrad", "RepMTL"])
@pytest.mark.parametrize("kind", ["tuple", "map", "sequence", "list"])
def test_features_of_another_shape_are_refused(name, kind):
    """A feature map whose width is F by chance would be rotated along the wrong dimension."""
    body, heads, x = network()
    f = {
        "tuple": (body(x), body(x)),
        "map": torch.randn(2, 3, 6, 6, requires_grad=True),
        "sequence": body(torch.randn(2, 5, 4)),
        "list": [body(x)],
    }[kind]
    strategy = fresh(name, **({"features": 6} if name == "RotoGrad" else {}))
    with pytest.raises((ValueError, TypeError), match=rf"features: .*{name} needs one tensor of shape \(N, F\)"):
        strategy.views(f)
        mtl.backward(errors(body(x), heads), strategy, body, heads, features=f)


def test_views_must_be_asked_for():
    body, heads, x = network()
    strategy = fresh("RotoGrad", features=6)
    f = body(x)
    with pytest.raises(RuntimeError, match=re.escape("strategy.views(features)[i]")):
        mtl.backward(errors(f, heads), strategy, body, heads, features=f)


# ------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", METHODS)
def test_a_loop_that_saves_and_loads_goes_on_exactly(name):
    """Everything is in state_dict, the random stream and the progress included; it is tensors, loaded without code."""
    straight = Loop(name)
    straight.epoch(0)
    straight.strategy.epoch_start(1, 4)
    for step in (3, 4):
        straight.fill(step)
        straight.finish(step)
    state = {"net": straight.net.state_dict(), "strategy": straight.strategy.state_dict()}
    torch.save({**state, "optimizer": straight.optimizer.state_dict()}, file := io.BytesIO())
    assert all(isinstance(value, torch.Tensor) for value in state["strategy"].values())
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = Loop(name)
    resumed.net.load_state_dict(saved["net"])
    resumed.strategy.load_state_dict(saved["strategy"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for loop in (straight, resumed):
        for step in range(5, 8):
            loop.fill(step)
            loop.finish(step)
    close(resumed.numbers(), straight.numbers(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["RLW", "PCGrad", "GradVac", "GradDrop"])
def test_manual_seed_decides_the_draws(name):
    """Also between two methods in one process, and without moving the global stream."""

    def draws(seed):
        torch.manual_seed(seed)
        strategy = fresh(name, 8)
        body, heads, x = network(tasks=8)
        torch.manual_seed(seed)
        for _ in range(3):
            mtl.backward(errors(body(x).tanh(), heads), strategy, body, heads)
        return body.weight.grad, torch.rand(1)

    first, again, other = draws(1), draws(1), draws(2)
    close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    close(first[1], torch.rand(1), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Equal", "Uncertainty", "RLW", "PCGrad", "AlignedMTL"])
def test_a_state_that_is_computed_with_is_loaded_or_refused(name):
    """As an average over all entries does it, also of states with and without a random stream; or a change of dtype."""
    fields = ("epoch", "epochs", "calls", "names", "_seed", "_base")
    body, heads, x = network()
    strategy = fresh(name)
    average = dict(strategy.state_dict())
    mtl.backward(errors(body(x), heads), strategy, body, heads)
    state = strategy.state_dict()
    for cast in (torch.half, torch.bfloat16, torch.double):
        again = fresh(name)
        again.load_state_dict({key: value.to(cast) for key, value in state.items()})
        assert all(getattr(again, field) == getattr(strategy, field) for field in fields)
    for _ in range(5):
        same = {key: 0.9 * value + 0.1 * value for key, value in state.items()}
        average = {key: 0.9 * average[key] + 0.1 * value for key, value in state.items()}
    again.load_state_dict(same)
    assert all(getattr(again, field) == getattr(strategy, field) for field in fields)
    with pytest.raises(ValueError, match=r"state_dict: the entry _extra_state was changed; copy it"):
        again.load_state_dict(average)


def test_a_state_of_an_older_version_loads():
    """Text as uint8, as it was before."""
    loop = Loop("rlw")
    loop.epoch(0)
    state = loop.strategy.state_dict()
    text = json.dumps(unpack(state["_extra_state"])).encode()
    again = make("rlw")
    again.load_state_dict(state | {"_extra_state": torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    assert torch.equal(again.get_extra_state(), state["_extra_state"])


def test_checkpoints_of_the_first_release_load():
    loop, again = Loop("dwa"), make("dwa")
    loop.epoch(0)
    again.load_state_dict({key: value for key, value in loop.strategy.state_dict().items() if "extra" not in key})
    close(again.memory(), loop.strategy.memory(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", METHODS)
def test_a_strategy_can_be_copied_and_pickled(name):
    loop = Loop(name)
    loop.fill(0)
    loop.finish(0)
    copies = [copy.deepcopy(loop.strategy), make(name)]
    copies[1].load_state_dict(loop.strategy.state_dict())
    for other in copies:
        close(other.memory(), loop.strategy.memory(), rtol=0, atol=0, equal_nan=True)


# -------------------------------------------------------------------------------------------------- negative losses


@pytest.mark.parametrize(
    "name",
    ["DBMTL", "MoCo", "UncertaintySoftmax", "GradNorm", "GLS", "ScaleInvariant", "FAMO", "STCH", "IMTLL", "IMTL"],
)
def test_methods_that_take_logarithms_or_ratios_refuse_a_negative_loss(name):
    body, heads, x = network()
    strategy = fresh(name)
    losses = errors(body(x).tanh(), heads)
    with pytest.raises(ValueError, match=rf"losses\[1\] \(1\): negative .*{name}"):
        mtl.backward([losses[0], losses[1] - 9], strategy, body, heads)
    strategy.epoch_start(4, 10)
    losses = errors(body(x).tanh(), heads)
    with pytest.raises(ValueError, match="in epoch 5"):
        mtl.backward([losses[0], losses[1] - 9], strategy, body, heads)
    losses = errors(body(x).tanh(), heads)  # where the task is absent, its loss says nothing
    mtl.backward([losses[0], losses[1] - 9], strategy, body, heads, present=[True, False])


def test_dwa_refuses_a_negative_mean():
    with pytest.raises(ValueError, match=r"DWA.*mean loss of 1 is negative"):
        fresh("DWA").epoch_end(Statistics(torch.tensor([1.0, -2.0])))


def test_log_losses_refuse_a_negative_loss():
    body, heads, x = network()
    losses = errors(body(x).tanh(), heads)
    with pytest.raises(ValueError, match=r"losses\[0\].*Equal is given log-losses"):
        mtl.backward([losses[0] - 50, losses[1]], Equal(2), body, heads, switches=mtl.Switches(transform="log"))


# ------------------------------------------------------------------------------------------------- several processes

REFUSE_PROCESSES = ("auto_lambda", "moml", "rep_mtl", "consmtl", "rotograd")
FEATURES = ("mgda", "cagrad", "pcgrad")
DRAWING = ("RLW", "PCGrad", "GradDrop")
PARTIAL = ("Equal", "Uncertainty", "MGDA", "UPGrad")


def _replica(rank: int, file: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    for name in METHODS:
        try:
            torch.manual_seed(rank)  # a stranger's processes are seeded apart
            loop = Loop(name, DistributedDataParallel, slice(rank, None, 2))
            for epoch in range(3):
                loop.epoch(epoch, steps=2)
            found[name] = loop.numbers()
        except ValueError as error:
            found[name] = str(error)
    for name in FEATURES:
        loop = Loop(name, DistributedDataParallel, slice(rank, None, 2), switches=mtl.Switches(gradients="features"))
        for epoch in range(3):
            loop.epoch(epoch, steps=2)
        found[f"{name} of features"] = loop.numbers()
    for name in DRAWING:
        loop = Loop(fresh(name, TASKS).double(), DistributedDataParallel, slice(rank, None, 2))
        torch.manual_seed(rank)
        loop.fill(0)
        found[f"{name} unseeded"] = torch.cat([g.flatten() for g in loop.gradients()])
    for name in PARTIAL:  # the second process has no label of the second task
        loop = Loop(fresh(name, TASKS).double(), DistributedDataParallel, slice(rank, None, 2))
        loop.fill(0, present=[True, rank == 0, True])
        found[f"{name} partial"] = torch.cat([g.flatten() for g in loop.gradients()])
    results.put((rank, pickle.dumps(found)))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> dict[int, dict]:
    """What two processes with DistributedDataParallel end with, for every method."""
    file = tmp_path_factory.mktemp("gloo") / "store"
    results = multiprocessing.get_context("spawn").Queue()
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        started = multiprocessing.spawn(_replica, (str(file), results), nprocs=2, join=False)
        found = {rank: pickle.loads(data) for rank, data in (results.get(timeout=300) for _ in range(2))}
        started.join()
    return found


@pytest.mark.parametrize("name", [*METHODS, *(f"{name} of features" for name in FEATURES)])
def test_replicas_are_equal_and_equal_to_one_process(replicas, name):
    """Six steps over three epochs, every hook called with what one process sees."""
    first, second = replicas[0][name], replicas[1][name]
    if name in REFUSE_PROCESSES:
        assert first == second and first.startswith("group: ")
        return
    assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))
    method, _, of_features = name.partition(" of ")
    options = {"switches": mtl.Switches(gradients="features")} if of_features else {}
    whole = Loop(method, **options)
    for epoch in range(3):
        whole.epoch(epoch, steps=2)
    close(first, whole.numbers(), rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("name", DRAWING)
def test_replicas_draw_the_same_however_their_processes_are_seeded(replicas, name):
    first, second = replicas[0][f"{name} unseeded"], replicas[1][f"{name} unseeded"]
    assert first.any() and torch.equal(first, second)


@pytest.mark.parametrize("name", PARTIAL)
def test_a_task_that_one_process_lacks_is_the_other_processes_alone(replicas, name):
    """As one process with the losses (a + b) / 2, of the task that is partly missing the one that is there."""
    assert torch.equal(replicas[0][f"{name} partial"], replicas[1][f"{name} partial"])
    loop = Loop(fresh(name, TASKS).double())
    parts = [loop.losses(*(t[rank::2] for t in batch(0)))[0] for rank in range(2)]
    losses = [a if i == 1 else (a + b) / 2 for i, (a, b) in enumerate(zip(*parts, strict=True))]
    mtl.backward(losses, loop.strategy, loop.net.trunk, loop.net.heads)
    close(replicas[0][f"{name} partial"], torch.cat([g.flatten() for g in loop.gradients()]), rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------ found by a stranger's tries


def test_heads_in_the_wrong_order_are_seen_beside_everything_shared():
    body, heads, x = network()
    with pytest.raises(ValueError, match=r"heads\[0\].*task order"):
        everything = [*body.parameters(), *heads[0].parameters(), *heads[1].parameters()]
        mtl.backward(errors(body(x), heads), fresh("PCGrad"), everything, heads[::-1])


def test_losses_computed_as_one_vector_do_not_pass_for_tied():
    """Heads whose outputs are joined before the loss: the graph is one, the gradients are not."""
    found = []
    for everything in (True, False):
        body, heads, x = network()
        f = body(x).tanh()
        losses = (torch.cat([h(f) for h in heads], 1) - torch.tensor([1.0, 2.0])).square().mean(0)
        shared = [body, *heads] if everything else body
        mtl.backward(losses, fresh("CAGrad"), shared, heads)
        found.append([p.grad for m in (body, *heads) for p in m.parameters()])
    close(found[0], found[1])


def test_a_tied_weight_behind_a_head_of_zeros_is_shared():
    """Its other loss has a gradient of 0 in the first step; it is shared all the same."""
    embedding, body, zero = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 1)
    nn.init.zeros_(zero.weight)
    f = body(embedding(torch.randn(8, 4)))
    losses = [nn.functional.linear(f, embedding.weight.T).square().mean(), (zero(f) - 1).square().mean()]
    info = mtl.backward(losses, fresh("PCGrad"), [embedding, body], [embedding, zero])
    assert info.weights.isfinite().all() and embedding.weight.grad.any()


def test_each_task_is_looked_at_however_the_tasks_take_turns():
    torch.manual_seed(0)
    body, heads, x = nn.Linear(4, 6), [nn.Linear(6, 1) for _ in range(4)], torch.randn(8, 4)
    strategy, wrong = fresh("PCGrad", 4), [heads[0], heads[1], heads[3], heads[2]]
    with pytest.raises(ValueError, match=r"heads\[2\].*task order"):
        for step in range(4):
            present = [i == step for i in range(4)]
            mtl.backward(errors(body(x), heads), strategy, body, wrong, present=present)


@pytest.mark.parametrize("name", ["Equal", "PCGrad"])
def test_a_stack_does_not_hide_a_detached_loss(name):
    body, heads, x = network()
    first, second = errors(body(x), heads)
    with pytest.raises(ValueError, match=r"losses\[1\]|heads\[1\]"):
        mtl.backward(torch.stack([first, second.detach()]), fresh(name), body, heads)


def test_a_method_may_compute_in_place():
    class Mine(Equal):
        def forward(self, losses, present=None):
            losses *= torch.tensor([2.0, 3.0])
            return losses.sum()

    body, heads, x = network()
    assert mtl.backward(errors(body(x), heads), Mine(2), body, heads).weights.tolist() == [2, 3]


def test_an_overflow_in_a_head_alone_leaves_the_memory_untouched():
    """The loss and the trunk's gradient are finite, the head's is not."""

    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    for name in ("DBMTL", "MoCo", "GradNorm"):
        loop = Loop(fresh(name, TASKS).double())
        for step in range(2):
            loop.fill(step)
            loop.finish(step)
        before = {k: v.clone() for k, v in loop.strategy.named_buffers()}
        losses, _ = loop.losses(*batch(2))
        losses[0] = losses[0] + Cliff.apply(loop.net.heads[0].bias).sum()
        mtl.backward(losses, loop.strategy, loop.net.trunk, loop.net.heads)
        close(dict(loop.strategy.named_buffers()), before, rtol=0, atol=0)


def test_manual_seed_decides_the_draws_of_every_epoch():
    def draws(seed):
        torch.manual_seed(seed)
        strategy = fresh("RLW", 4)
        strategy.epoch_start(0, 2)
        return strategy(torch.ones(4)), strategy.epoch_start(1, 2), strategy(torch.arange(4.0))

    assert draws(1) == draws(1) != draws(2)


def test_a_state_of_other_tasks_is_refused():
    state = fresh("DWA", ["x", "y"]).state_dict()
    with pytest.raises(ValueError, match="of the tasks x, y, in this order; this strategy has y, x"):
        fresh("DWA", ["y", "x"]).load_state_dict(state)


@pytest.mark.parametrize("tasks", ["segmentation", ["a", "a"], []])
def test_tasks_are_a_number_or_names(tasks):
    with pytest.raises(ValueError, match=r"^tasks: "):
        fresh("PCGrad", tasks)


def test_switches_are_checked():
    with pytest.raises(ValueError, match="scale: 'Norm' is none of paper, sum, norm"):
        mtl.Switches(scale="Norm")


def test_all_of_the_gradient_must_go_through_the_features():
    body, heads, x = network()
    features = mtl.Switches(gradients="features")
    cut = body(x).detach().requires_grad_()
    with pytest.raises(ValueError, match="features: reach no parameter of shared"):
        mtl.backward(errors(cut, heads), fresh("MGDA"), body, heads, features=cut, switches=features)
    f = body(x)
    losses = [loss + 0.1 * body.weight.square().sum() for loss in errors(f, heads)]
    with pytest.raises(ValueError, match="features: the loss of task 0 reaches shared parameters by another way"):
        mtl.backward(losses, fresh("MGDA"), body, heads, features=f, switches=features)


def test_an_optimizer_in_the_backward_pass_is_refused_where_it_would_not_run():
    body, heads, x = network()
    body.weight.register_post_accumulate_grad_hook(lambda p: None)
    mtl.backward(errors(body(x), heads), fresh("Equal"), body)
    with pytest.raises(ValueError, match=r"shared: .*hook"):
        mtl.backward(errors(body(x), heads), fresh("PCGrad"), body, heads)


@pytest.mark.parametrize("how", ["before the step", "after it", "by hand", "skipped at times"])
def test_after_step_before_the_step_is_an_error(how):
    """FAMO would see the old losses, and its weights would stand still in silence."""
    loop = Loop("famo")
    loop.strategy.epoch_start(0, 4)

    def steps():
        for step in range(40):
            loop.fill(step)
            if how == "before the step":
                loop.look_back(step)
            if how == "by hand":
                for p in loop.net.parameters():
                    p.data.sub_(0.05 * p.grad)
            elif how != "skipped at times" or step % 20 == 0:
                loop.optimizer.step()
            if how != "before the step":
                loop.look_back(step)

    if how == "before the step":
        with pytest.raises(RuntimeError, match=r"FAMO .* call it after optimizer\.step\(\)"):
            steps()
    else:
        steps()
