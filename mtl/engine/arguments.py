"""Converts the arguments of `mtl.backward` to one form, and refuses wrong ones.

Callers may give lists, tensors, dicts by task name, modules or generators. Every error message begins with the
argument's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mtl.losses.base import Strategy


def scalars(name: str, given: Any, names: Sequence[str]) -> list[Tensor]:
    """T losses of shape (), in the order of the strategy's tasks, in one dtype of at least 32 bits.

    Args:
        name: name of the argument, for messages.
        given: a sequence, a (T,) tensor or a mapping from task names; each loss is a tensor with one number.
        names: names of the tasks.

    Raises:
        ValueError: there are not T losses, a name is unknown, or a loss is not a single real number.
        TypeError: a loss is not a tensor.
    """
    if isinstance(given, Tensor) and given.dim() == 0:
        given = given[None]
    if not isinstance(given, Mapping | Sequence | Tensor):
        given = list(given)
    losses = list(_in_task_order(name, given, names))
    if len(losses) != len(names):
        raise ValueError(f"{name}: {len(losses)} losses for a strategy of {len(names)} tasks ({', '.join(names)})")
    for i, loss in enumerate(losses):
        where = f"{name}[{i}] ({names[i]})"
        if not isinstance(loss, Tensor):
            hint = "; .item() and float() cut a loss off from the network" if isinstance(loss, float) else ""
            hint = (
                "; without labels of this task give torch.zeros(()), and say so with present=" if loss is None else hint
            )
            raise TypeError(f"{where}: a {type(loss).__name__}, not a tensor{hint}")
        if loss.numel() != 1:
            shape = tuple(loss.shape)
            raise ValueError(f"{where}: shape {shape}; a loss is one number, such as the mean over the batch")
        if not loss.is_floating_point():
            raise ValueError(f"{where}: dtype {loss.dtype}; a loss is a real floating-point number")
    # Half precision is too coarse for logarithms and ratios of losses.
    dtype = torch.float32
    for other in {loss.dtype for loss in losses}:
        dtype = torch.promote_types(dtype, other)
    alike = [loss if loss.dtype == dtype else loss.to(dtype) for loss in losses]
    return [loss if loss.dim() == 0 else loss.reshape(()) for loss in alike]


def marks(given: Any, names: Sequence[str], device: torch.device) -> Tensor | None:
    """(T,) bool `present` on `device`; None if all tasks are present.

    Raises:
        ValueError: there is not one bool for each task.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        given = list(_in_task_order("present", given, names))
    try:
        present = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"present: {error}; one bool for each of {', '.join(names)} is needed") from error
    if present.shape != (len(names),) or present.is_floating_point() or present.is_complex():
        what = f"shape {tuple(present.shape)} of {str(present.dtype).removeprefix('torch.')}"
        raise ValueError(f"present: {what}; one bool for each of the {len(names)} tasks is needed")
    return present.to(device=device, dtype=torch.bool)


def parameters(name: str, given: Any) -> list[Parameter]:
    """The parameters in `given`, each once.

    Args:
        name: name of the argument, for messages.
        given: a module, a parameter, or any nesting of iterables and mappings of these. Pairs of a name and a parameter
            are also allowed, as from `named_parameters()`.

    Raises:
        TypeError: `given` contains something other than a parameter.
    """
    return list({id(p): p for p in _flatten(name, given)}.values())


def check_grad_mode(samples: Sequence[Sequence[Tensor]]) -> None:
    """Check that gradients are enabled, or were when the losses were computed.

    Raises:
        ValueError: they were disabled in both places, so nothing can be trained.
    """
    off = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
    known = any(loss.requires_grad for losses in samples for loss in losses)
    if torch.is_inference_mode_enabled() or not (torch.is_grad_enabled() or known):
        raise ValueError(
            f"losses: gradients are switched off here; compute them and call mtl.backward outside of {off}"
        )


def shared_parameters(given: Any, strategy: Strategy) -> list[Parameter]:
    """The trainable parameters in `shared`; an empty list if all of them are frozen.

    The module given as `shared` may contain the strategy. The strategy's own parameters are left out.

    Raises:
        ValueError: `shared` contains no parameter at all.
        TypeError: as in `parameters`.
    """
    found = parameters("shared", given)
    if not found:
        raise ValueError(
            "shared: no parameters; a generator such as model.parameters() yields them only once, "
            "so call it anew for each step or keep a list"
        )
    own = {id(p) for p in strategy.parameters()}
    model = [p for p in found if id(p) not in own]
    if not model:
        raise ValueError("shared: holds only the strategy's own parameters, which belong into the optimizer instead")
    return [p for p in model if p.requires_grad]


def head_parameters(given: Any, strategy: Strategy, exclusive: bool) -> list[list[Parameter]]:
    """The trainable parameters of each head, in task order.

    Args:
        given: for each task a module, or a collection of parameters; in task order or by task name.
        strategy: the method.
        exclusive: whether a parameter may belong to one head only.

    Raises:
        ValueError: there is not one collection for each task, or two of them contain the same parameter.
        TypeError: as in `parameters`.
    """
    names, groups = strategy.names, given
    # A ModuleDict is a mapping by task name. A single module or parameter counts as one head; iterating a module would
    # fail with a message that helps nobody.
    if isinstance(given, nn.ModuleDict | nn.ParameterDict):
        groups = dict(given.items())
    elif (
        isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList | nn.Sequential | nn.ParameterList)
    ) or isinstance(given, Parameter):
        groups = [given]
    elif not isinstance(given, Mapping):
        groups = list(given)
    groups = list(_in_task_order("heads", groups, names))
    if len(groups) != len(names):
        raise ValueError(
            f"heads: {len(groups)} collections of parameters for {len(names)} tasks ({', '.join(names)}); "
            "give one for each task, which may be empty"
        )
    own = {id(p) for p in strategy.parameters()}
    heads = [
        [p for p in parameters(f"heads[{i}]", group) if p.requires_grad and id(p) not in own]
        for i, group in enumerate(groups)
    ]
    owner: dict[int, int] = {}
    for i, head in enumerate(heads):
        for p in head:
            if (other := owner.setdefault(id(p), i)) != i and exclusive:
                raise ValueError(
                    f"heads[{other}] and heads[{i}] hold the same parameter, of shape {tuple(p.shape)}; "
                    "what several tasks use belongs in shared"
                )
    return heads


def check_plain(found: Sequence[Parameter]) -> None:
    """Refuse parameters for which a gradient in `.grad` is not enough.

    Per-task gradients come from `torch.autograd.grad`, and are written to `.grad` at the end. Hooks that run during a
    usual backward pass never see them.

    Raises:
        ValueError: a parameter is divided among processes (FSDP), or has a hook that runs after its gradient.
    """
    for p in found:
        if hasattr(p, "full_tensor") or hasattr(p, "_is_flat_param"):
            raise ValueError(
                "shared: parameters that FSDP or tensor parallelism has divided; gradients of single tasks need whole "
                "ones, as DistributedDataParallel keeps them"
            )
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"shared: a parameter of shape {tuple(p.shape)} has a hook that runs after its gradient was "
                "accumulated (an optimizer in the backward pass?); gradients of single tasks do not run it"
            )


def loss_scale(given: Any, device: torch.device) -> Tensor | float | None:
    """The loss scale: a tensor on `device` from a GradScaler, or a number; None stands for 1.

    Raises:
        ValueError: the scale is not positive.
        TypeError: the argument is neither a GradScaler nor a number.
    """
    if given is None:
        return None
    if isinstance(given, torch.amp.GradScaler):
        # The scale as a tensor. `get_scale()` would make the host wait for the device.
        return given.scale(torch.ones((), device=device)) if given.is_enabled() else None
    if isinstance(given, Tensor) and given.numel() == 1:
        return given.detach().reshape(()).to(device)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"scale: a {type(given).__name__}; give the GradScaler itself, or the number that it holds")
    if not 0 < given < float("inf"):
        raise ValueError(f"scale: {given} is not a positive, finite number")
    return None if given == 1 else float(given)


def _in_task_order(name: str, given: Any, names: Sequence[str]) -> Iterable[Any]:
    if not isinstance(given, Mapping):
        return given
    if len(by_name := {str(key): value for key, value in given.items()}) == len(given):
        given = by_name  # keys such as 0 and "0" both name the first of unnamed tasks
    if set(given) != set(names):
        shown = ", ".join(map(str, given))
        raise ValueError(
            f"{name}: keys {shown}; the strategy's tasks are {', '.join(names)} (tasks=[...] gives them names)"
        )
    return [given[key] for key in names]


def _flatten(name: str, given: Any) -> Iterable[Tensor]:
    if isinstance(given, nn.Module):
        yield from given.parameters()
    elif isinstance(given, Tensor):
        if not given.is_leaf:
            raise TypeError(f"{name}: a tensor of shape {tuple(given.shape)} that is computed, not a parameter")
        yield given
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from _flatten(name, value)
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: {given!r:.60} is no parameter, module or collection of these")
    else:
        for item in given:
            if type(item) is Parameter and item.is_leaf:
                yield item  # the usual case, without a call for each parameter in every step
                continue
            pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
            yield from _flatten(name, item[1] if pair else item)
