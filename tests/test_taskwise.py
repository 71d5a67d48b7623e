"""AdaTask and MTL-IO in a loop of one's own: micro-batches, clipping, a GradScaler, saving and loading."""

import copy
import io

import pytest
import torch
from torch import nn

import mtl
from mtl.optim.signum import Signum
from mtl.optim.taskwise import BASES, MTLIO, AdaTask


def network() -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    return nn.Linear(4, 6).double(), [nn.Linear(6, 1).double() for _ in range(2)]


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()


def step(parts=(X,), base="sgd", present=(None, None), between=None, edit=None, steps=1, scale=1.0, lr=0.1):
    """The shared weight after AdaTask's steps over micro-batches, and the optimizer."""
    body, heads = network()
    parameters = [p for m in (body, *heads) for p in m.parameters()]
    optimizer = AdaTask(parameters, lr=lr, base=base)
    for _ in range(steps):
        optimizer.zero_grad()
        for i, (part, here) in enumerate(zip(parts, present, strict=False)):
            features = body(part).tanh()
            losses = [scale * (h(features) - i).pow(2).mean() / len(parts) for i, h in enumerate(heads)]
            here = None if here is None else torch.tensor(here)
            mtl.backward(losses, mtl.losses.Equal(tasks=2), body.parameters(), [h.parameters() for h in heads], here,
                         per_task=True)  # fmt: skip
            if between and not i:
                between(parameters)
        if edit:
            edit(parameters)
        optimizer.step()
    return body.weight.detach(), optimizer


@pytest.mark.parametrize("base", BASES)
def test_micro_batches_add_up_to_the_whole_batch(base):
    torch.testing.assert_close(step(X.chunk(2), base, steps=3)[0], step((X,), base, steps=3)[0], rtol=1e-10, atol=1e-12)


def test_a_task_in_one_of_the_micro_batches_is_present():
    _, optimizer = step(X.chunk(2), "adam", present=([True, False], [False, False]))
    body = optimizer.param_groups[0]["params"][0]
    assert body.task_present.tolist() == [True, False] and optimizer.state[body]["t"].flatten().tolist() == [1, 0]


def scaled(factor):
    def edit(parameters):
        for p in parameters:
            p.grad *= factor

    return edit


@pytest.mark.parametrize("base", BASES)
def test_what_is_done_to_the_gradient_is_done_to_the_tasks(base):
    """clip_grad_norm_ and unscale_ multiply by one number, whose effect a smaller loss has, too."""
    norm = []

    def clip(parameters):
        norm.append(torch.nn.utils.clip_grad_norm_(parameters, 0.05))

    clipped = step(base=base, edit=clip)[0]
    factor = (0.05 / (norm[0] + 1e-6)).item()
    assert factor < 0.5
    torch.testing.assert_close(clipped, step(base=base, scale=factor)[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        step(X.chunk(2), base, between=scaled(0.0), edit=scaled(2.0))[0],
        step((X[4:],), base)[0], rtol=1e-9, atol=1e-12)  # fmt: skip


def test_an_untouched_gradient_changes_no_bit():
    a, _ = step(base="adam")
    body, heads = network()
    again = AdaTask([p for m in (body, *heads) for p in m.parameters()], lr=0.1)
    features = body(X).tanh()
    mtl.backward([(h(features) - i).pow(2).mean() for i, h in enumerate(heads)], mtl.losses.Equal(tasks=2),
                 body.parameters(), [h.parameters() for h in heads], per_task=True)  # fmt: skip
    for p in body.parameters():
        p.task_sum = None  # no rescaling at all
    again.step()
    assert torch.equal(a, body.weight)


def test_clipping_by_value_bounds_the_sum_of_the_tasks():
    weight, optimizer = step(edit=lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.01), lr=1.0)
    body = optimizer.param_groups[0]["params"][0]
    torch.testing.assert_close(body.task_grads.sum(0), body.grad)
    assert (weight - network()[0].weight).abs().max() <= 0.01 * (1 + 1e-9)


def test_gradients_are_forgotten_by_whichever_zero_grad():
    whole = step()[0]
    for forget in ("optimizer", "none", "zero"):
        body, heads = network()
        modules = nn.ModuleList([body, *heads])
        optimizer = AdaTask(modules.parameters(), lr=0.1, base="sgd")
        for _ in range(2):
            features = body(X).tanh()
            losses = [(h(features) - i).pow(2).mean() for i, h in enumerate(heads)]
            if forget == "optimizer":
                optimizer.zero_grad()
            else:
                modules.zero_grad(set_to_none=forget == "none")
            mtl.backward(losses, mtl.losses.Equal(tasks=2), body.parameters(), [h.parameters() for h in heads],
                         per_task=True)  # fmt: skip
        optimizer.step()
        torch.testing.assert_close(body.weight.detach(), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [AdaTask, MTLIO])
def test_a_new_optimizer_goes_on_from_a_state_dict(kind):
    """Loaded before its first step, with other arguments than it was made with: all of them come from the state."""

    def train(modules, optimizer, steps):
        body, *heads = modules
        for _ in range(steps):
            optimizer.zero_grad()
            losses = [(h(body(X).tanh()) - i).pow(2).mean() for i, h in enumerate(heads)]
            if kind is MTLIO:
                for k, loss in enumerate(losses):
                    optimizer.zero_grad()
                    loss.backward(retain_graph=True, inputs=[*body.parameters(), *heads[k].parameters()])
                for k in range(2):
                    optimizer.step_task(k, 2)
            else:
                mtl.backward(losses, mtl.losses.Equal(tasks=2), body.parameters(), [h.parameters() for h in heads],
                             per_task=True)  # fmt: skip
                optimizer.step()

    body, heads = network()
    whole = nn.ModuleList([body, *heads])
    optimizer = kind(whole.parameters(), lr=0.02, base="adam", betas=(0.8, 0.9), eps=1e-3, weight_decay=0.01)
    train(whole, optimizer, 2)
    parts, content = copy.deepcopy(whole), io.BytesIO()
    torch.save(optimizer.state_dict(), content)
    content.seek(0)
    again = kind(parts.parameters(), lr=1.0, base="sgd")
    again.load_state_dict(torch.load(content, weights_only=True))
    train(whole, optimizer, 2)
    train(parts, again, 2)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_an_old_state_dict_lacks_what_is_now_in_the_groups():
    _, optimizer = step(base="adam")
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for name in ("rule", "betas", "eps"):
            del group[name]
    again = AdaTask(optimizer.param_groups[0]["params"], base="rmsprop")
    again.load_state_dict(state)
    again.step()


def test_what_cannot_be_right_is_refused():
    _, optimizer = step()
    body = optimizer.param_groups[0]["params"][0]
    optimizer.zero_grad()
    body.grad = torch.ones_like(body)
    with pytest.raises(RuntimeError, match="gradients of 1 tasks, and had 2 before"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="step_task"):
        MTLIO([body]).step()
    sparse = nn.Embedding(4, 2, sparse=True)
    for kind in (AdaTask, Signum):
        sparse(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse"):
            kind(sparse.parameters()).step()


@pytest.mark.parametrize("kind", [AdaTask, Signum])
def test_a_closure_is_called(kind):
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and (p < 1).all()


@pytest.mark.parametrize("name", ["Equal", "PCGrad"])
def test_merged_gradients_are_refused(name):
    """AdaTask would be plain Adam with them."""
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()])

    def fill(**options):
        features = body(X).tanh()
        losses = [(h(features) - i).pow(2).mean() for i, h in enumerate(heads)]
        mtl.backward(losses, getattr(mtl.losses, name)(tasks=2), body, heads, **options)

    before = body.weight.detach().clone()
    for parts in ([{}], [{"per_task": True}, {}]):  # alone, and as one of two micro-batches
        for options in parts:
            fill(**options)
        with pytest.raises(
            RuntimeError, match=r"AdaTask: .*merged from 2 tasks; call mtl.backward\(..., per_task=True"
        ):
            optimizer.step()
        assert torch.equal(body.weight, before)
        optimizer.zero_grad(set_to_none=False)
    fill(per_task=True)
    optimizer.step()
    assert not torch.equal(body.weight, before)


def test_one_task_and_a_frozen_trunk_need_no_rows():
    body, heads = network()
    optimizer = AdaTask([*body.parameters(), *heads[0].parameters()])
    mtl.backward([heads[0](body(X)).pow(2).mean()], mtl.losses.Equal(tasks=1), body, heads[:1])
    optimizer.step()
    body.requires_grad_(False)
    optimizer = AdaTask([p for h in heads for p in h.parameters()])
    mtl.backward([h(body(X)).pow(2).mean() for h in heads], mtl.losses.Equal(tasks=2), body, heads)
    optimizer.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("zero", ["optimizer", "zeros", "none"])
def test_the_head_of_an_absent_task_rests(base, zero):
    """Weight, momentum, counter and weight decay; a task in one of two micro-batches is there."""
    body, heads = network()
    modules = nn.ModuleList([body, *heads])
    optimizer = AdaTask(modules.parameters(), lr=0.1, base=base, weight_decay=0.1)
    absent = [[[True, True]], [[True, False]], [[True, False], [True, False]], [[True, False], [True, True]]]
    rests = []
    for parts in absent:
        optimizer.zero_grad() if zero == "optimizer" else modules.zero_grad(set_to_none=zero == "none")
        before = copy.deepcopy([[p.detach(), optimizer.state.get(p, {})] for p in heads[1].parameters()])
        for there in parts:
            features = body(X).tanh()
            losses = [(h(features) - i - 1).pow(2).mean() for i, h in enumerate(heads)]
            present = torch.tensor(there)
            mtl.backward(losses, mtl.losses.Equal(tasks=2), body, heads, present, per_task=True)
        optimizer.step()
        rests.append([
            torch.equal(p, old) and all(torch.equal(optimizer.state[p][n], t) for n, t in state.items())
            for p, (old, state) in zip(heads[1].parameters(), before, strict=True)
        ])  # fmt: skip
    assert rests == [[False, False], [True, True], [True, True], [False, False]]
