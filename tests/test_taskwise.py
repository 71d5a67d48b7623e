"""AdaTask and MTL-IO in a loop of one's own: clipping, a GradScaler, absent tasks, saving and loading."""

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


def update(body, heads, optimizer, x=X, labelled=None, scale=1.0, name="Equal", **options):
    """One `mtl.Step`."""
    strategy = getattr(mtl.losses, name)(tasks=len(heads))

    def forward(part):
        features = body(x[part]).tanh()
        return [scale * (h(features) - i).pow(2).mean() for i, h in enumerate(heads)]

    return mtl.Step(strategy, optimizer, body, heads, **options)(forward, len(x), labelled)


def trained(base="sgd", steps=1, lr=0.1, **options):
    """The shared weight after AdaTask's steps."""
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()], lr=lr, base=base)
    for _ in range(steps):
        update(body, heads, optimizer, **options)
    return body.weight.detach()


@pytest.mark.parametrize("base", BASES)
def test_the_tasks_gradients_are_clipped_as_their_sum_is(base):
    """Clipping multiplies by one number, whose effect a smaller loss has, too."""
    body, heads = network()
    sum((h(body(X).tanh()) - i).pow(2).mean() for i, h in enumerate(heads)).backward()
    norm = nn.utils.get_total_norm([p.grad for m in (body, *heads) for p in m.parameters()])
    factor = (0.05 / (norm + 1e-6)).item()
    assert factor < 0.5
    torch.testing.assert_close(trained(base, max_norm=0.05), trained(base, scale=factor), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.05}])
def test_a_grad_scaler_changes_nothing(base, clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = trained(base, steps=3, **clip)
    torch.testing.assert_close(trained(base, steps=3, scaler=scaler, **clip), plain, rtol=1e-12, atol=1e-14)


def test_a_step_that_overflows_is_skipped():
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()])
    before = body.weight.detach().clone()
    update(body, heads, optimizer, scale=float("inf"), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert torch.equal(body.weight, before) and not optimizer.state


@pytest.mark.parametrize("kind", [AdaTask, MTLIO])
def test_a_new_optimizer_goes_on_from_a_state_dict(kind):
    """Loaded before its first step, with other arguments than it was made with: all of them come from the state."""

    def train(modules, optimizer, steps):
        body, *heads = modules
        for _ in range(steps):
            if kind is MTLIO:
                losses = [(h(body(X).tanh()) - i).pow(2).mean() for i, h in enumerate(heads)]
                for k, loss in enumerate(losses):
                    optimizer.zero_grad()
                    loss.backward(retain_graph=True, inputs=[*body.parameters(), *heads[k].parameters()])
                for k in range(2):
                    optimizer.step_task(k, 2)
            else:
                update(body, heads, optimizer)

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
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()])
    update(body, heads, optimizer)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for name in ("rule", "betas", "eps"):
            del group[name]
    again = AdaTask(optimizer.param_groups[0]["params"], base="rmsprop")
    again.load_state_dict(state)
    update(body, heads, again)
    assert again.param_groups[0]["rule"] == BASES.index("rmsprop")


def test_what_cannot_be_right_is_refused():
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()])
    update(body, heads, optimizer)
    with pytest.raises(RuntimeError, match="gradients of 1 tasks, and had 2 before; make a new optimizer"):
        update(body, heads[:1], optimizer)
    with pytest.raises(RuntimeError, match="step_task"):
        MTLIO([body.weight]).step()
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    for kind, rows in ((AdaTask, {"rows": {}}), (Signum, {})):
        with pytest.raises(RuntimeError, match="sparse"):
            kind(sparse.parameters()).step(**rows)


@pytest.mark.parametrize("name", ["Equal", "PCGrad"])
def test_merged_gradients_are_refused(name):
    """AdaTask would be plain Adam with them."""
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()])
    before = body.weight.detach().clone()
    losses = [(h(body(X).tanh()) - i).pow(2).mean() for i, h in enumerate(heads)]
    mtl.backward(losses, getattr(mtl.losses, name)(tasks=2), body, heads)
    for closure in ((), (lambda: None,)):
        with pytest.raises(RuntimeError, match=r"^AdaTask: needs the gradient of each task, .*with mtl.Step\("):
            optimizer.step(*closure)
    assert torch.equal(body.weight, before)
    update(body, heads, optimizer, name=name)
    assert not torch.equal(body.weight, before)


def test_a_closure_is_called():
    p = nn.Parameter(torch.ones(3))
    optimizer = Signum([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and (p < 1).all()


@pytest.mark.parametrize("name", ["Equal", "PCGrad"])
def test_one_task_and_a_frozen_trunk(name):
    body, heads = network()
    optimizer = AdaTask([*body.parameters(), *heads[0].parameters()])
    update(body, heads[:1], optimizer, name=name)
    assert len(optimizer.state[body.weight]["m"]) == 1
    body.requires_grad_(False)
    optimizer = AdaTask([p for h in heads for p in h.parameters()])
    for labelled in (None, torch.tensor([[True, False]] * len(X))):
        before = heads[1].weight.detach().clone()
        update(body, heads, optimizer, labelled=labelled, name=name)
        assert torch.equal(heads[1].weight, before) == (labelled is not None)


def test_the_rows_are_gone_after_the_step():
    """Nothing is left on the parameters: the next step starts from its own gradients."""
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()])
    update(body, heads, optimizer)
    assert not [name for p in body.parameters() for name in vars(p)]


@pytest.mark.parametrize("base", BASES)
def test_the_head_of_an_absent_task_rests(base):
    """Weight, momentum, counter and weight decay; and its row of the shared parameters' state."""
    body, heads = network()
    optimizer = AdaTask([p for m in (body, *heads) for p in m.parameters()], lr=0.1, base=base, weight_decay=0.1)
    there = torch.ones(len(X), 2, dtype=torch.bool)
    update(body, heads, optimizer, labelled=there)
    before = copy.deepcopy([[p.detach(), optimizer.state[p]] for p in heads[1].parameters()])
    shared = copy.deepcopy(optimizer.state[body.weight])
    update(body, heads, optimizer, labelled=there & torch.tensor([True, False]))
    for p, (old, state) in zip(heads[1].parameters(), before, strict=True):
        assert torch.equal(p, old) and all(torch.equal(optimizer.state[p][n], t) for n, t in state.items())
    assert all(torch.equal(optimizer.state[body.weight][n][1], t[1]) for n, t in shared.items())
    assert optimizer.state[body.weight]["t"].flatten().tolist() == [2, 1]
