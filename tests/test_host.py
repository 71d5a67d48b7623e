"""A method's small problem is solved on the CPU, also if the gradients are on a GPU."""

import pytest
import torch
from test_gramian import METHODS

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
    monkeypatch.setattr("mtl.losses.host.fetched", lambda given: [torch.ones(t.shape, dtype=t.dtype) for t in given])
    assert on_host(lambda x: x.double() + 1)(torch.empty(3, device="meta")).is_meta


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_the_bits_of_a_cpu(name):
    """Its weights and its state, over steps with and without an absent task."""
    T = 5
    plain, moved = (METHODS[name].make(T) for _ in range(2))
    for seed in range(4):
        J = torch.randn(T, 7, generator=torch.Generator().manual_seed(seed))
        present = torch.arange(T) != 1 if seed % 2 else None
        J, losses = J if present is None else J * present[:, None], torch.full((T,), 0.5 + seed)
        facts = {"losses": losses} if present is None else {"losses": losses, "present": present}
        with torch.no_grad():
            torch.manual_seed(0)
            expected = plain.weights(J @ J.T, **taken(plain, "weights", **facts))
            torch.manual_seed(0)
            facts = {key: elsewhere(value) for key, value in taken(moved, "weights", **facts).items()}
            found = moved.weights(elsewhere(J @ J.T), **facts)
        assert found.dtype == expected.dtype and torch.equal(found.as_subclass(torch.Tensor), expected)
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), moved.buffers(), strict=True))
