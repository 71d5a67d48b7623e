"""Two processes with a replica of the model each: the step of one process, or one line in both. Nobody waits."""

import copy
import os
import pickle
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from loops import TASKS, Loop, Net, batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mtl
from mtl.certify.problem import make
from mtl.engine.replicas import Replicas
from mtl.losses import Statistics
from mtl.losses.extra import unpack

close = torch.testing.assert_close
VARIANTS = {
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "no_sync": {},
}
METHODS = ("equal", "uncertainty", "pcgrad", "graddrop")
CASES = {}


def case(function):
    """`function(rank)` runs in both processes, in a group of its own; what it returns or raises is looked at here."""
    CASES[function.__name__] = function
    return function


def ddp(strategy, rank: int, wrap=DistributedDataParallel, **options) -> Loop:
    return Loop(strategy, wrap, slice(rank, None, 2), **options)


def train(loop: Loop, steps, **options) -> Loop:
    for step in steps:
        loop.fill(step, **options)
        loop.finish(step)
    return loop


def fresh(name: str, **options):
    return getattr(mtl.losses, name)(tasks=TASKS, **options).double()


# ------------------------------------------------------------------------------------------------- unrelated models


class Other(Loop):
    """An own model in each process, which is not wrapped."""

    def __init__(self, strategy, rank, seed, **options):
        super().__init__(strategy, part=slice(rank, None, 2), **options)
        self.net = self.model = Net(seed)
        self.optimizer = torch.optim.SGD([*self.net.parameters(), *self.strategy.parameters()], lr=0.05)


@case
def other_models(rank):
    return train(Other("pcgrad", rank, seed=rank), range(2)).numbers()


@case
def other_models_of_loss_weighting(rank):
    return train(Other("equal", rank, seed=rank), range(2)).numbers()


@case
def other_rates(rank):
    """A search over learning rates from one seed: in the first step all models are equal."""
    loop = Other("pcgrad", rank, seed=0)
    loop.optimizer.param_groups[0]["lr"] = 0.05 * (rank + 1)
    return train(loop, range(2)).numbers()


@case
def a_model_loaded_in_one_process(rank):
    loop = ddp("uncertainty", rank)
    if rank == 0:
        loop.net.load_state_dict(Net(5).state_dict())
    return train(loop, range(1)).numbers()


@case
def own_models_alone(rank):
    return train(Other("dwa", rank, seed=rank, group=None), range(3)).numbers()


DIFFERENT = (
    "group: the processes hold different models; "
    "set strategy.group = None if each process trains its own model, or wrap"
)


@pytest.mark.parametrize(
    "name", ["other_models", "other_models_of_loss_weighting", "other_rates", "a_model_loaded_in_one_process"]
)
def test_models_that_differ_are_not_averaged(found, name):
    assert all(isinstance(error, str) and f"ValueError: {DIFFERENT}" in error for error in found[name])


def test_with_group_none_each_process_is_alone(found):
    for rank, ours in enumerate(found["own_models_alone"]):
        close(ours, train(Other("dwa", rank, seed=rank), range(3)).numbers(), rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------- hooks before the first step


def statistics(loop: Loop, rank: int) -> Statistics:
    losses = torch.stack([x.detach() for x in loop.net(*(t[loop.part] for t in batch(9)))[0]])
    return Statistics(losses, None if rank == 1 else 90 - losses, torch.ones(TASKS, dtype=torch.bool))


def resumed(loop: Loop, again: Loop) -> Loop:
    for a, b in ((loop.net, again.net), (loop.strategy, again.strategy)):
        b.load_state_dict(copy.deepcopy(a.state_dict()))
    return again


def hook_first(name: str, rank: int) -> list[torch.Tensor]:
    """Stopped between the last step of an epoch and its end."""
    ends = []
    straight = ddp(name, rank)
    straight.strategy.epoch_start(0, 4)
    straight.fill(0)
    straight.optimizer.step()
    for loop in (resumed(straight, ddp(name, rank)), straight):
        loop.look_back(0)
        loop.strategy.epoch_end(statistics(loop, rank))
        loop.strategy.epoch_start(1, 4)
        ends.append(train(loop, range(1, 4)).numbers())
    return ends


@case
def dwa_resumes_with_the_end_of_an_epoch(rank):
    return hook_first("dwa", rank)


@case
def famo_resumes_after_a_step(rank):
    return hook_first("famo", rank)


@case
def epoch_end_before_any_step(rank):
    loop = ddp("dwa", rank)
    loop.strategy.epoch_end(statistics(loop, 0))
    return train(loop, range(1)).numbers()


@pytest.mark.parametrize("name", ["dwa_resumes_with_the_end_of_an_epoch", "famo_resumes_after_a_step"])
def test_a_hook_before_the_first_step_of_a_resumed_process_averages(found, name):
    (again, straight), (other, _) = found[name]
    assert torch.equal(again.nan_to_num(-1), other.nan_to_num(-1))
    close(again, straight, rtol=0, atol=0, equal_nan=True)


def test_before_any_step_it_is_refused(found):
    for error in found["epoch_end_before_any_step"]:
        assert "ValueError: group: strategy.epoch_end was called before the first mtl.backward" in error


def test_one_process_goes_on_alone_from_the_state_of_a_group():
    strategy = make("dwa")
    strategy.grouped = True
    again = make("dwa")
    again.load_state_dict(strategy.state_dict())
    again.epoch_end(Statistics(torch.ones(TASKS)))
    assert again.grouped and again.alone is None
    train(Loop(again), range(1))
    assert not again.grouped


def test_checkpoints_of_own_methods_say_nothing_of_groups():
    """A run's checkpoint holds all attributes of a user's class, and one of an earlier release has not these two."""
    from mtl.engine.pydecode import SKIPPED

    assert {"grouped", "alone"} <= SKIPPED and vars(make("dwa")).keys() >= {"grouped", "alone"}
    assert "grouped" not in unpack(make("dwa").get_extra_state())


# --------------------------------------------------------------------------------------------------- state of one alone


def loaded_in(name: str, rank: int, ranks) -> torch.Tensor:
    before = train(ddp(name, rank), range(3))
    again = ddp(name, rank)
    again.net.load_state_dict(before.net.state_dict())
    if rank in ranks:
        again.strategy.load_state_dict(copy.deepcopy(before.strategy.state_dict()))
    return train(again, range(3, 5)).numbers()


def _loaded(name, ranks):
    def run(rank):
        return loaded_in(name, rank, ranks)

    run.__name__ = f"{name} loaded in {ranks}"
    case(run)


LOADED = ("moco", "db_mtl", "gradvac", "graddrop", "famo")
for _name in LOADED:
    _loaded(_name, (0,))
    _loaded(_name, (0, 1))
_loaded("db_mtl", (1,))


@pytest.mark.parametrize("name", LOADED)
def test_all_take_over_what_the_first_process_has_loaded(found, name):
    one, both = (found[f"{name} loaded in {ranks}"] for ranks in ((0,), (0, 1)))
    close(one[0], one[1], rtol=0, atol=0, equal_nan=True)
    close(one[0], both[0], rtol=0, atol=0, equal_nan=True)


def test_what_only_another_has_loaded_is_not_lost_in_silence(found):
    for error in found["db_mtl loaded in (1,)"]:
        assert "ValueError: group: the strategy has made 3 steps in process 1, and 0 in process 0; load its" in error


@case
def a_strategy_made_anew_in_one_process(rank):
    loop = train(ddp("gradvac", rank), range(2))
    if rank == 1:
        loop.strategy = copy.deepcopy(loop.strategy)
    return train(loop, range(2, 4)).numbers()


@case
def marks_in_one_process(rank):
    return train(ddp("uncertainty", rank), range(2), present=None if rank else [True] * 3).numbers()


@case
def marks_in_one_process_of_a_gradient_method(rank):
    return train(ddp("famo", rank), range(2), present=None if rank else [True] * 3).numbers()


def test_a_strategy_made_anew_goes_on(found):
    first, second = found["a_strategy_made_anew_in_one_process"]
    close(first, second, rtol=0, atol=0, equal_nan=True)
    close(first, train(Loop("gradvac"), range(4)).numbers(), rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "method"), [("marks_in_one_process", "uncertainty"), ("marks_in_one_process_of_a_gradient_method", "famo")]
)
def test_present_may_be_given_in_one_process_only(found, name, method):
    first, second = found[name]
    close(first, second, rtol=0, atol=0, equal_nan=True)
    close(first, train(Loop(method), range(2)).numbers(), rtol=1e-6, atol=1e-8, equal_nan=True)


# ----------------------------------------------------------------------------------------------- the error of one alone


@case
def an_error_in_one_process(rank):
    """And the next step is a step again."""
    loop, errors = ddp("pcgrad", rank), []
    for step in range(3):
        try:
            losses, _ = loop.losses(*(t[loop.part] for t in batch(step)))
            losses = losses[:2] if rank == 1 and step == 1 else losses
            loop.optimizer.zero_grad()
            mtl.backward(losses, loop.strategy, loop.net.trunk, loop.net.heads)
            loop.optimizer.step()
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    return errors, loop.numbers()


def test_all_hear_of_it(found):
    (heard, ours), (own, others) = found["an_error_in_one_process"]
    assert own == ["losses: 2 losses for a strategy of 3 tasks (0, 1, 2)"]
    assert heard == [f"group: process 1 has ended this step: {own[0]}"]
    assert torch.equal(ours, others)
    close(ours, train(Loop("pcgrad"), (0, 2)).numbers(), rtol=1e-6, atol=1e-8)


@case
def differ_tasks(rank):
    loop = ddp("pcgrad", rank)
    losses, _ = loop.losses(*(t[loop.part] for t in batch(0)))
    mtl.backward(losses[: 3 - rank], mtl.losses.PCGrad(3 - rank), loop.net.trunk, list(loop.net.heads)[: 3 - rank])


@case
def differ_method(rank):
    train(ddp(["pcgrad", "cagrad"][rank], rank), range(1))


@case
def differ_switches(rank):
    train(ddp("pcgrad", rank, switches=mtl.Switches(scale=["sum", "norm"][rank])), range(1))


@case
def differ_seed(rank):
    loop = train(ddp("graddrop", rank), range(1))
    loop.strategy.epoch_start(0, 2, seed=rank)
    train(loop, range(1, 2))


@case
def differ_call(rank):
    """One process has fewer batches, and ends its epoch sooner."""
    loop = train(ddp("dwa", rank), range(2))
    if rank == 1:
        loop.fill(2)
    else:
        loop.strategy.epoch_end(statistics(loop, 0))


@case
def differ_epoch(rank):
    loop = train(ddp("dwa", rank), range(1))
    loop.strategy.epoch_start(0, 4)
    if rank == 1:
        loop.strategy.epoch = 1
    train(loop, range(1, 2))


@pytest.mark.parametrize(("name", "what"), [
    ("differ_tasks", "tasks: 0, 1, 2 in process 0, 0, 1 in process 1"),
    ("differ_method", "method: PCGrad in process 0, CAGrad in process 1"),
    ("differ_switches", "switches: "),
    ("differ_seed", "seed of the random stream: "),
    ("differ_call", "call: epoch_end in process 0, mtl.backward in process 1"),
    ("differ_epoch", "epoch: 0 in process 0, 1 in process 1"),
])  # fmt: skip
def test_calls_that_do_not_belong_together_are_refused_in_both(found, name, what):
    assert all(f"ValueError: group: the processes differ in {what}" in error for error in found[name])


@case
def one_process_leaves(rank):
    loop = train(ddp("pcgrad", rank), range(2))
    if rank == 1:
        return None
    return train(loop, range(2, 3)).numbers()


def test_a_process_that_is_gone_is_one_line(found):
    message = "group: a process has left, or makes another call; all must call mtl.backward"
    assert message in found["one_process_leaves"][0]


# ------------------------------------------------------------------------------------------------------ absent tasks


def constants(method: str, rank: int, absent, wrap=DistributedDataParallel) -> torch.Tensor:
    """`absent`: for each process the tasks whose losses are constants."""
    loop = ddp(method, rank, wrap)
    loop.optimizer.zero_grad()
    losses, features = loop.losses(*(t[loop.part] for t in batch(0)))
    present = [i not in absent[rank] for i in range(TASKS)]
    losses = [x if there else torch.zeros((), dtype=x.dtype) for x, there in zip(losses, present, strict=True)]
    mtl.backward(losses, loop.strategy, loop.net.trunk, loop.net.heads, present, features=features)
    return torch.cat([g.flatten() for g in loop.gradients()])


def whole(method: str, absent) -> torch.Tensor:
    """The gradients of one process for the means over the processes in which a task is present."""
    loop, losses = Loop(method), []
    parts = [loop.losses(*(t[rank::2] for t in batch(0)))[0] for rank in range(2)]
    for i in range(TASKS):
        present = [part[i] for rank, part in enumerate(parts) if i not in absent[rank]]
        losses.append(torch.stack(present).mean() if present else torch.zeros((), dtype=torch.float64))
    there = [any(i not in gone for gone in absent) for i in range(TASKS)]
    mtl.backward(losses, loop.strategy, loop.net.trunk, loop.net.heads, there)
    return torch.cat([g.flatten() for g in loop.gradients()])


ALL = (0, 1, 2)
PATTERNS = {"all here": ((), ALL), "one here": ((), (1,)), "one in each": ((0,), (1,)), "all of all": (ALL, ALL)}


def _constant(method, pattern, unused):
    def run(rank):
        return constants(method, rank, PATTERNS[pattern], lambda net: DistributedDataParallel(
            net, find_unused_parameters=unused))  # fmt: skip

    run.__name__ = f"{method}, {pattern}, {unused}"
    case(run)


GIVEN = [(m, p, u) for m in ("uncertainty", "pcgrad", "graddrop", "moco") for p in PATTERNS for u in (False, True)
         if u is False or m == "uncertainty"]  # fmt: skip
for _given in GIVEN:
    _constant(*_given)


@pytest.mark.parametrize(("method", "pattern", "unused"), GIVEN)
def test_losses_without_a_graph_are_right_or_refused_in_both(found, method, pattern, unused):
    results = found[f"{method}, {pattern}, {unused}"]
    if method == "uncertainty" and (pattern == "all here" or (not unused and pattern != "all of all")):
        why = "1 of 2 processes have no label" if pattern == "all here" else "has no graph in this process"
        assert all(isinstance(error, str) and why in error for error in results)
        return
    close(results[0], results[1], rtol=0, atol=0)
    close(results[0], whole(method, PATTERNS[pattern]), rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- tied weights


class Tied(nn.Module):
    """Two heads on one layer; the first head is tied to an embedding that both tasks go through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 1)
        self.double()

    def losses(self, x, y):
        f = self.body(self.embedding(x)).tanh()
        return [(f @ self.embedding.weight).square().mean(), (self.head(f)[:, 0] - y[:, 0]).square().mean()]

    def fill(self, losses, present=None):
        heads = [[self.embedding.weight], self.head]
        mtl.backward(losses, mtl.losses.PCGrad(2).double(), [self.embedding, self.body], heads, present)
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.parameters()])


def tied(rank: int, absent) -> torch.Tensor:
    net = Tied()
    losses = net.losses(*(t[rank::2] for t in batch(0)))
    losses = [torch.zeros((), dtype=x.dtype) if i in absent[rank] else x for i, x in enumerate(losses)]
    return net.fill(losses, [i not in absent[rank] for i in range(2)])


TIED = {f"tied, absent {absent}": absent for absent in (((), (1,)), ((), (0,)), ((0,), (1,)), ((0,), ()))}
for _name, _absent in TIED.items():
    CASES[_name] = lambda rank, absent=_absent: tied(rank, absent)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_weight_is_shared_in_both_whatever_one_lacks(found, name):
    close(*found[name], rtol=0, atol=0)
    net, parts = Tied(), []
    parts = [net.losses(*(t[rank::2] for t in batch(0))) for rank in range(2)]
    losses = [torch.stack([part[i] for r, part in enumerate(parts) if i not in TIED[name][r]]).mean() for i in range(2)]
    close(found[name][0], net.fill(losses), rtol=1e-6, atol=1e-9)


def test_in_one_process_a_tied_weight_of_an_absent_task_trains_the_other():
    net = Tied()
    losses = net.losses(*batch(0))
    net.fill([torch.zeros((), dtype=torch.float64), losses[1]], [False, True])
    (expected,) = torch.autograd.grad(net.losses(*batch(0))[1], net.embedding.weight)
    close(net.embedding.weight.grad, expected)


# ------------------------------------------------------------------------------------------------------------- variants


def variant(method: str, rank: int, name: str, steps: int = 4):
    loop = ddp(method, rank, lambda net: DistributedDataParallel(net, **VARIANTS[name]))
    if name != "no_sync":
        return train(loop, range(steps)).numbers()
    for step in range(0, steps, 2):
        accumulate(loop, step, loop.model.no_sync)
    return loop.numbers()


def accumulate(loop: Loop, step: int, no_sync=nullcontext) -> None:
    """One step of the optimizer for two backward passes."""
    loop.optimizer.zero_grad()
    for k in range(2):
        with no_sync() if k == 0 else nullcontext():
            losses, features = loop.losses(*(t[loop.part] for t in batch(step + k)))
            mtl.backward(losses, loop.strategy, loop.net.trunk, loop.net.heads, features=features)
    loop.optimizer.step()


for _method in METHODS:
    for _name in VARIANTS:
        CASES[f"{_method} {_name}"] = lambda rank, method=_method, name=_name: variant(method, rank, name)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_ways_to_wrap_a_model(found, method, name):
    first, second = found[f"{method} {name}"]
    close(first, second, rtol=0, atol=0)
    loop = Loop(method)
    if name == "no_sync":
        for step in (0, 2):
            accumulate(loop, step)
    else:
        train(loop, range(4))
    close(first, loop.numbers(), rtol=1e-6, atol=1e-8)


@case
def fsdp_in_one_parameter(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    loop = ddp("equal", rank, lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")))
    mtl.backward(loop.losses(*batch(0))[0], loop.strategy, loop.model)


@case
def fsdp_in_views(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    loop = ddp("equal", rank, lambda net: FullyShardedDataParallel(net, **options))
    mtl.backward(loop.losses(*batch(0))[0], loop.strategy, loop.model)


@case
def fsdp_of_tensors(rank):
    from torch.distributed.fsdp import fully_shard

    def wrap(net):
        mesh = dist.init_device_mesh("cpu", (2,))
        fully_shard(net.trunk, mesh=mesh)
        fully_shard(net, mesh=mesh)
        return net

    ddp("equal", rank, wrap).fill(0)


@pytest.mark.parametrize("name", ["fsdp_in_one_parameter", "fsdp_in_views", "fsdp_of_tensors"])
def test_sharded_parameters_are_refused(found, name):
    assert all("ValueError: shared: parameters of FSDP" in error for error in found[name])


# --------------------------------------------------------------------------------------------------------------- groups


@case
def a_scaled_loss(rank):
    return train(ddp("uncertainty", rank), range(2), scale=1.0).numbers()


@case
def gradients_of_single_tasks(rank):
    from mtl.optim.taskwise import AdaTask

    return stepped(Loop("equal", DistributedDataParallel, slice(rank, None, 2), AdaTask)).numbers()


def stepped(loop: Loop) -> Loop:
    """Three updates of `mtl.Step`, which hands each task's gradient to the optimizer."""
    step = mtl.Step(loop.strategy, loop.optimizer, loop.net.trunk, loop.net.heads)
    for k in range(3):
        x, y = (t[loop.part] for t in batch(k))
        step(lambda part, x=x, y=y: loop.losses(x[part], y[part])[0], len(x))
    return loop


@case
def uneven_parts(rank):
    loop = Loop("pcgrad", DistributedDataParallel, slice(0, 5) if rank else slice(5, 12))
    return train(loop, range(2)).numbers()


def test_replicas_stay_equal(found):
    """A loss scale, an optimizer for single tasks, parts of a batch that are not equally large."""
    from mtl.optim.taskwise import AdaTask

    for name in ("a_scaled_loss", "gradients_of_single_tasks", "uneven_parts"):
        close(*found[name], rtol=0, atol=0)
    close(found["a_scaled_loss"][0], train(Loop("uncertainty"), range(2)).numbers(), rtol=1e-6, atol=1e-8)
    loop = stepped(Loop("equal", optimizer=AdaTask))
    close(found["gradients_of_single_tasks"][0], loop.numbers(), rtol=1e-6, atol=1e-8)


@case
def not_a_member(rank):
    ddp("pcgrad", rank, group=dist.GroupMember.NON_GROUP_MEMBER).fill(0)


@case
def a_group_of_one(rank):
    groups = [dist.new_group([k]) for k in range(2)]
    return train(Other("pcgrad", rank, seed=rank, group=groups[rank]), range(2)).numbers()


@case
def a_group_of_all(rank):
    return train(ddp("moco", rank, group=dist.new_group([0, 1])), range(2)).numbers()


def test_groups(found):
    assert all(
        "ValueError: group: " in error and "is no open process group" in error for error in found["not_a_member"]
    )
    for rank, ours in enumerate(found["a_group_of_one"]):
        close(ours, train(Other("pcgrad", rank, seed=rank), range(2)).numbers(), rtol=0, atol=0)
    first, second = found["a_group_of_all"]
    close(first, second, rtol=0, atol=0)
    close(first, train(Loop("moco"), range(2)).numbers(), rtol=1e-6, atol=1e-8)


def test_a_group_without_torch_distributed_is_refused():
    loop = Loop("pcgrad")
    with pytest.raises(ValueError, match=r"^group: .* is no open process group to which this process belongs"):
        loop.strategy.group = "world"
        mtl.backward(loop.losses(*batch(0))[0], loop.strategy, loop.net.trunk, loop.net.heads)


@pytest.mark.parametrize(("config", "of", "carrier"), [
    ("cpu:gloo,cuda:gloo", "cpu", "cpu"), ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
    ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
    ("cuda:nccl", "cpu", "cuda:3"), ("cuda:nccl", "cuda:1", "cuda:1"), ("cpu:gloo", "cuda:1", "cpu"),
])  # fmt: skip
def test_what_a_group_cannot_carry_goes_through_its_own_device(monkeypatch, config, of, carrier):
    """NCCL refuses tensors of the CPU."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert Replicas(None).carrier(torch.device(of)) == torch.device(carrier)


# ------------------------------------------------------------------------------------------------------- both processes


def _process(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    found = {}
    for number, name in enumerate(names):
        # Both begin at once: a case that ends with an error may end later in one process.
        Path(folder, f"ready{number}-{rank}").touch()
        while not Path(folder, f"ready{number}-{1 - rank}").exists():
            time.sleep(0.01)
        store = f"file://{folder}/{number}"
        limit = timedelta(seconds=20)  # what would wait for ever is an error
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
        try:
            found[name] = CASES[name](rank)
        except Exception as error:
            found[name] = "".join(traceback.format_exception_only(error))
        dist.destroy_process_group()
    Path(folder, f"found{rank}").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list]:
    """What each case ended with in the two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
        folder = tmp_path_factory.mktemp("gloo")
        multiprocessing.spawn(_process, (str(folder), list(CASES)), nprocs=2)
    both = [pickle.loads((folder / f"found{rank}").read_bytes()) for rank in range(2)]
    return {name: [results[name] for results in both] for name in CASES}
