"""A method's small problem is solved on the CPU, also if the gradients are on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtl import losses as methods
from mtl.config.source import definition
from mtl.losses import host
from mtl.losses.host import fetched, on_host
from mtl.losses.signatures import taken


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU, until it is copied to the CPU."""

    is_cpu = False

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(Elsewhere)


def test_one_copy_brings_tensors_of_several_types_without_a_changed_bit():
    given = [torch.rand(3, 3), torch.tensor([True, False, True]), torch.rand(3).double(), torch.rand(()), torch.eye(2)]
    for tensor, copy in zip(given, fetched([elsewhere(t) for t in given]), strict=True):
        assert type(copy) is torch.Tensor and copy.dtype == tensor.dtype and torch.equal(copy, tensor)


def test_a_function_gets_its_tensors_on_the_cpu_and_all_else_as_it_is():
    @on_host
    def solve(first, factor, second=None, *, third=None):
        """Its docstring."""
        assert type(first) is torch.Tensor and second is None and type(third) is torch.Tensor
        return first * factor, third

    ones, flags = torch.ones(2, 2), torch.tensor([True, False])
    product, same = solve(elsewhere(ones), 3, third=elsewhere(flags))
    assert torch.equal(product, 3 * ones) and torch.equal(same, flags)
    assert solve.__doc__ == "Its docstring."


def test_a_result_returns_to_the_device_of_the_arguments(monkeypatch):
    monkeypatch.setattr(host, "fetched", lambda given: [torch.ones(t.shape, dtype=t.dtype) for t in given])
    assert on_host(lambda x: x.double() + 1)(torch.empty(3, device="meta")).is_meta


METHODS = {name: cls for name, cls in vars(methods).items() if isinstance(cls, type) and hasattr(cls, "weights")}
METHODS.pop("GramianWeighting")


def make(name: str, T: int) -> methods.GramianWeighting:
    return METHODS[name](T, *([[1.0] * T] if METHODS[name].single_task_argument else []))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_bits_of_a_cpu(name):
    """Its weights and its state, over steps with and without an absent task."""
    T = 5
    plain, moved = make(name, T), make(name, T)
    for seed in range(4):
        present = torch.arange(T) != 1 if seed % 2 else None
        J = torch.randn(T, 7, generator=torch.Generator().manual_seed(seed))
        J = J if present is None else J * present[:, None]
        facts = taken(plain, "weights", losses=torch.full((T,), 0.5 + seed), present=present)
        there = {key: value if value is None else elsewhere(value) for key, value in facts.items()}
        with torch.no_grad():
            torch.manual_seed(0)  # both draw the same orders
            expected = plain.weights(J @ J.T, **facts)
            found = moved.weights(elsewhere(J @ J.T), **there)
        assert found.dtype == expected.dtype and torch.equal(found.as_subclass(torch.Tensor), expected)
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), moved.buffers(), strict=True))


class Operations(TorchDispatchMode):
    """Counts the operations on tensors without data, as a GPU would get them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.count += isinstance(found, torch.Tensor) and found.is_meta
        return found


@pytest.mark.parametrize("name", METHODS)
def test_a_device_gets_few_operations_and_is_waited_for_once(name, monkeypatch):
    """Tensors without data cannot be read: whatever a step asks of the host raises here, except for one copy."""
    T, waits = 40, []
    here = {(T, T): torch.eye(T), (T,): torch.ones(T)}
    monkeypatch.setattr(host, "fetched", lambda given: waits.append(1) or [here[t.shape].to(t.dtype) for t in given])
    strategy, ones = make(name, T).to("meta"), torch.ones(T, device="meta")
    facts = taken(strategy, "weights", present=ones.bool(), losses=ones)
    with Operations() as operations:
        weights = strategy.weights(torch.ones(T, T, device="meta"), **facts)
    assert weights.shape == (T,) and weights.is_meta
    assert len(waits) <= 1 and operations.count < 70


def test_an_error_about_a_decorated_function_names_its_own_line():
    @on_host
    def wrong(gramian):
        return gramian

    assert "test_host.py:" in definition(wrong)
