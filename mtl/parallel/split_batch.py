"""One forward and backward pass, divided among processes, with the same result as a single process.

All processes hold the same batch. Each one sends its part of the images through the backbone. Then all processes get
the features of the whole batch. From there on, every process computes the same as a single one would: heads, losses,
method, optimizer, metrics. So no method has to know about processes.

With sharing schemes and other whole models, no single tensor separates the shared part from the heads. There each
process computes the whole model on its part, and all processes get the predictions of the whole batch.

The processes exchange:

- the features, or the predictions: every process fills in its rows (`_Gather`);
- the gradients of the divided part's parameters: each backward pass sums them with one flat all_reduce, also in a
  method's look-ahead (`_Replicate`). In a whole model, there is one for the shared parameters and one for each task's
  own. So the graph of a task's loss ends at this task's parameters, as in a single process;
- the statistics of batch norm, in the forward and in the backward pass (`_BatchNorm`);
- nothing for dropout: each process draws the mask of the whole batch and uses its part.

The price: all processes prepare the whole batch, and compute what is not divided. Both are cheap compared with a
backbone. Second derivatives stop at the features. For the heads (ConsMTL, Rep-MTL) they are right; for the backbone
they are refused. A method that reads features is refused with a whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from mtl.archs.model import Model
from mtl.data.columns import Batch
from mtl.tasks.predictions import each, tensors

Sum = Callable[[Tensor], Tensor]  # an all_reduce in place: adds the other processes' tensors to this one, returns it
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def forward(backbone: nn.Module, inputs: Sequence[Tensor], rank: int, size: int, sum_: Sum) -> Tensor:
    """The features of all samples. This process computes only its own part of them.

    Args:
        backbone: maps inputs (n, …) to features (n, …). Its parameters must be the same in all processes.
        inputs: (N, …) each, the same in all processes. N may be any number, even less than `size`.
        rank, size: number of this process, and of all processes.
        sum_: an all_reduce.

    Returns:
        (N, …), with the same bits in all processes. If its gradient is the same in all processes, the parameters'
        gradients are, too.
    """
    total = len(inputs[0])
    rows = _rows(total, rank, size)
    with _Part(rank, size, sum_, rows, total, backbone.training):
        features = _run(backbone, [backbone.parameters()], tuple(one[rows] for one in inputs), sum_)
    return _Gather.apply(features, sum_, rows.start, total)


def predictions(
    model: Model, batch: Batch, owned: Sequence[Iterable[nn.Parameter]], rank: int, size: int, sum_: Sum
) -> list[Any]:
    """Each task's prediction for all samples. This process computes only its own part of the samples.

    Args:
        model: any model. Its parameters must be the same in all processes.
        batch: N samples, the same in all processes.
        owned: the shared parameters, then each task's own.
        rank, size, sum_: as in `forward`.

    Raises:
        ValueError: a prediction cannot be put together from parts.
    """
    total = len(next(iter(batch.values())))
    rows = _rows(total, rank, size)
    part = {name: column[rows] for name, column in batch.items()}
    with _Part(rank, size, sum_, rows, total, model.training):
        found = _run(model, owned, (part,), sum_).predictions
    for one in found:
        if (what := obstacle(one, rows.stop - rows.start)) is not None:
            raise ValueError(f"a prediction holds {what}, which several processes cannot put together")
    return [each(lambda tensor: _Gather.apply(tensor, sum_, rows.start, total), one) for one in found]


def obstacle(prediction: Any, rows: int) -> str | None:
    """What in a prediction for `rows` samples cannot be put together from parts; None if everything can.

    Tensors with a row for each sample can, in any tuples, lists and dicts.
    """
    if isinstance(prediction, Tensor):
        return None if prediction.shape[:1] == (rows,) else f"a tensor {tuple(prediction.shape)} for {rows} samples"
    if isinstance(prediction, Mapping | tuple | list):
        parts = prediction.values() if isinstance(prediction, Mapping) else prediction
        return next((found for part in parts if (found := obstacle(part, rows)) is not None), None)
    return None if prediction is None else f"an object of class {type(prediction).__name__}"


def _rows(total: int, rank: int, size: int) -> slice:
    """The rows of process `rank`."""
    return slice(total * rank // size, total * (rank + 1) // size)


def _run(module: nn.Module, owned: Sequence[Iterable[nn.Parameter]], inputs: tuple[Any, ...], sum_: Sum) -> Any:
    """The module's output for these inputs, whose backward pass sums the parameters' gradients over the processes.

    Args:
        owned: lists of parameters. The gradients of a list are summed together.
    """
    if not torch.is_grad_enabled():
        return module(*inputs)
    # The module runs with copies of its parameters. Their backward function sums the gradients.
    named, copies = {name: p for name, p in module.named_parameters() if p.requires_grad}, {}
    for group in _groups(named, owned):
        copies |= zip(group, _Replicate.apply(sum_, *(named[name] for name in group)), strict=True)
    return functional_call(module, copies, inputs)


def _groups(named: Mapping[str, nn.Parameter], owned: Sequence[Iterable[nn.Parameter]]) -> list[list[str]]:
    """The names of the parameters in each list. A parameter in several lists, or in none, is a group of its own."""
    names = {id(p): name for name, p in named.items()}
    lists = [dict.fromkeys(names[id(p)] for p in one if id(p) in names) for one in owned]
    count = Counter(chain.from_iterable(lists))
    groups = [[name for name in one if count[name] == 1] for one in lists]
    return [group for group in groups if group] + [[name] for name in named if count[name] != 1]


def drawing(backbone: nn.Module, inputs: Sequence[Any]) -> str | None:
    """The name of a function in the backbone whose random numbers cannot be divided among processes, if there is one.

    Attention and recurrent layers draw their dropout inside one call, and a user's code may call torch.rand. Each
    process would then draw for its own part only, and the result would differ from a single process. So would dropout
    of other rows than the samples, such as an image's places. The function runs one training pass over `inputs`.
    Parameters, buffers and the random stream stay as they were.
    """
    first = next(iter(inputs[0].values())) if isinstance(inputs[0], Mapping) else inputs[0]
    with torch.no_grad(), _Draws(first.device, len(first)) as watch:
        _tried(backbone, inputs, backbone.named_buffers())  # copies, or batch norm's averages would change
    return watch.found


def reaches_past(backbone: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether the backbone uses a parameter otherwise than by its registered name, such as from a list that it keeps.

    `_run` puts copies in the places of the registered ones only. Such a parameter's gradient would not be summed.
    """
    with torch.enable_grad():
        found = _tried(backbone, inputs, [*backbone.named_parameters(), *backbone.named_buffers()])
    return any(tensor.requires_grad for tensor in tensors(found))


def _tried(backbone: nn.Module, inputs: Sequence[Any], replaced: Iterable[tuple[str, Tensor]]) -> Any:
    """The output of a training pass, with copies of parameters or buffers. The random stream stays as it was."""
    first = next(iter(inputs[0].values())) if isinstance(inputs[0], Mapping) else inputs[0]
    training, devices = backbone.training, [first.device] if first.device.type == "cuda" else []
    copies = {name: tensor.detach().clone() for name, tensor in replaced}
    with torch.random.fork_rng(devices):
        backbone.train()
        found = functional_call(backbone, copies, tuple(inputs))
    backbone.train(training)
    return found


class _Draws(TorchFunctionMode):
    """Notes the first function that draws random numbers, except dropout with a row for each of `rows` samples."""

    def __init__(self, device: torch.device, rows: int):
        super().__init__()
        self.device, self.rows, self.found = device, rows, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before = self._state()
        result = function(*args, **(kwargs or {}))
        known = function in DROPOUTS and args and len(args[0]) == self.rows
        if self.found is None and not known and not all(map(torch.equal, before, self._state())):
            self.found = getattr(function, "__name__", str(function))
        return result

    def _state(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]


class _Replicate(Function):
    """Passes parameters on unchanged. In the backward pass it sums their gradients over the processes.

    All gradients are summed by one flat all_reduce. A parameter that the pass does not reach gets none, as in a single
    process: with a gradient of 0, the optimizer would apply weight decay and momentum to it.
    """

    @staticmethod
    def forward(ctx, sum_: Sum, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.sum_ = sum_
        ctx.set_materialize_grads(False)
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        known = [g for g in gradients if g is not None]
        flat = ctx.sum_(torch.cat([g.reshape(-1) for g in known]))
        pieces = iter(flat.split([g.numel() for g in known]))
        return None, *(None if g is None else next(pieces).view(g.shape) for g in gradients)


class _Gather(Function):
    """From the rows (n, …) of each process to all rows (N, …) in every process.

    The incoming gradient is the same in all processes, so each one only cuts out its own rows.
    """

    @staticmethod
    def forward(ctx, part: Tensor, sum_: Sum, start: int, total: int) -> Tensor:
        ctx.rows = slice(start, start + len(part))
        # Zeros everywhere except in the own rows: then the sum over the processes puts all rows in place, exactly.
        whole = part.new_zeros(total, *part.shape[1:])
        whole[ctx.rows] = part
        return sum_(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient[ctx.rows], None, None, None


class _Part(TorchFunctionMode):
    """While it is active, batch norm and dropout act on the whole batch, although this process holds only a part of it.

    torch.nn.SyncBatchNorm is not used: it does not work on a CPU, and on a GPU it makes the host wait in every layer.
    """

    def __init__(self, rank: int, size: int, sum_: Sum, rows: slice, total: int, training: bool):
        super().__init__()
        self.rank, self.size, self.sum_ = rank, size, sum_
        self.rows, self.total, self.training = rows, total, training

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.training and function is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if self.training and function in DROPOUTS:
            return self._dropout(function, *args, **kwargs)
        return function(*args, **kwargs)

    def _batch_norm(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        weight = x.new_ones(x.shape[1]) if weight is None else weight
        bias = x.new_zeros(x.shape[1]) if bias is None else bias
        y, mean, unbiased = _BatchNorm.apply(x, weight, bias, eps, self.rank, self.size, self.sum_)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
        return y

    def _dropout(self, function, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        if len(x) != self.rows.stop - self.rows.start:
            raise ValueError(f"dropout of {len(x)} rows for {self.rows.stop - self.rows.start} images of this process")
        # Random numbers are drawn in memory order. With the order of x, the whole mask is a single process's mask.
        nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if nhwc else torch.contiguous_format
        whole = torch.empty(self.total, *x.shape[1:], dtype=x.dtype, device=x.device, memory_format=order).fill_(1)
        mask = function(whole, p, True)[self.rows]
        return x.mul_(mask) if inplace else x * mask


class _BatchNorm(Function):
    """Batch norm (N, C, …) with the mean and variance over the samples of all processes. A process may have no sample.

    Each process puts its mean, variance and count into a table that all processes then read. The parts are joined as in
    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 1983. It also
    returns the mean (C,) and the unbiased variance (C,).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, rank: int, size: int, sum_: Sum):
        channels, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
        table = torch.zeros(size, 2 * channels + 1, dtype=dtype, device=x.device)
        if x.numel():
            mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)  # the variance is the biased one
            table[rank, :channels], table[rank, channels:-1] = mean, variance
            table[rank, -1] = x.numel() // channels
        means, variances, counts = sum_(table).split([channels, channels, 1], 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.sum_ = eps, sum_
        y = F.batch_norm(x, mean, variance, weight.to(mean), bias.to(mean), False, 0.0, eps)
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        shape = (-1, *[1] * (x.dim() - 2))
        # First the gradient as if mean and variance were constants. Below, what flows through them is subtracted.
        if x.numel():
            kernel, scale = torch.ops.aten.native_batch_norm_backward, weight.to(mean)
            direct, to_weight, to_bias = kernel(
                gradient, x, scale, mean, variance, None, None, False, ctx.eps, [True] * 3
            )
        else:
            direct, to_weight, to_bias = torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
        along, level = (ctx.sum_(torch.stack([to_weight, to_bias])) / count).unbind()
        # The part through mean and variance: weight/σ (mean(dy) + x̂ mean(dy x̂)), with means over all samples.
        precision = (variance + ctx.eps).rsqrt()
        factor = weight.to(mean) * precision
        slope = factor * precision * along
        through = torch.addcmul((factor * level).view(shape), x - mean.view(shape), slope.view(shape))
        return (direct - through).to(x.dtype), to_weight.to(weight), to_bias.to(weight), None, None, None, None
