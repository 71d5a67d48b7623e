"""One forward and backward pass divided among processes, with the numbers of a single process at the same batch.

All processes hold the same batch. Each sends its part of the images through the backbone, and receives the features of
all; heads, losses, strategy, optimizer and metrics then do in every process what they would do in a single one, on the
same numbers. So no method knows of it, and none needs a rule of its own. What passes between the processes:

- the features: every process puts its rows in place (`_Gather`);
- the gradients of the backbone's parameters: summed by one flat all_reduce for each backward pass, wherever it is made,
  in a strategy's look-ahead as well (`_Replicate`);
- the statistics of batch norm, forwards and backwards (`_BatchNorm`);
- of dropout nothing: each process draws the mask of the whole batch and takes its part.

In return all processes compute the heads and prepare the whole batch: both small beside a backbone. Derivatives of
second order stop at the features: those of the heads (ConsMTL, Rep-MTL) are right, those of the backbone refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

Sum = Callable[[Tensor], Tensor]  # adds, in place, the same tensor of the other processes, and returns it
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def forward(backbone: nn.Module, inputs: Sequence[Tensor], rank: int, size: int, sum_: Sum) -> Tensor:
    """The features of all samples, of which this process computes the part that falls to it.

    Args:
        backbone: with the same parameters in all processes; inputs (n, …) → features (n, …).
        inputs: (N, …) each, the same in all; N need not be a multiple of `size`, and may be less.
        rank, size: this process's number and how many there are.
        sum_: an all_reduce.

    Returns:
        (N, …), the same bits in all processes. Its gradient must be the same in all, too; then so are the parameters'.
    """
    total = len(inputs[0])
    start, stop = (total * r // size for r in (rank, rank + 1))
    part = tuple(one[start:stop] for one in inputs)
    with _Part(rank, size, sum_, slice(start, stop), total, backbone.training):
        if torch.is_grad_enabled():
            named = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
            ours = dict(zip(named, _Replicate.apply(sum_, *named.values()), strict=True))
            features = functional_call(backbone, ours, part)
        else:
            features = backbone(*part)
    return _Gather.apply(features, sum_, start, total)


def drawing(backbone: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    """The first function in a training pass over `inputs` that draws random numbers which cannot be divided.

    Attention and recurrent layers draw their dropout inside of one call, and own code may call torch.rand: each process
    would draw for its own part, and the results would not be those of a single process. Parameters, buffers and the
    random stream stay as they were.
    """
    copies = {name: b.clone() for name, b in backbone.named_buffers()}  # batch norm's averages would move
    training, devices = backbone.training, [inputs[0].device] if inputs[0].is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices), _Draws(inputs[0].device) as watch:
        backbone.train()
        functional_call(backbone, copies, tuple(inputs))
    backbone.train(training)
    return watch.found


class _Draws(TorchFunctionMode):
    """Notes the first function that moves the global random stream, dropout apart."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.found = device, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before = self._state()
        result = function(*args, **(kwargs or {}))
        if self.found is None and function not in DROPOUTS and not all(map(torch.equal, before, self._state())):
            self.found = getattr(function, "__name__", str(function))
        return result

    def _state(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]


class _Replicate(Function):
    """The parameters themselves; their gradients are summed over the processes, all in one flat all_reduce."""

    @staticmethod
    def forward(ctx, sum_: Sum, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.sum_ = sum_
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = ctx.sum_(torch.cat([g.reshape(-1) for g in gradients]))
        pieces = flat.split([g.numel() for g in gradients])
        return None, *(piece.view(g.shape) for piece, g in zip(pieces, gradients, strict=True))


class _Gather(Function):
    """(n, …) of each process → (N, …) of all in every process; a gradient, which is the same in all, is cut again."""

    @staticmethod
    def forward(ctx, part: Tensor, sum_: Sum, start: int, total: int) -> Tensor:
        ctx.rows = slice(start, start + len(part))
        whole = part.new_zeros(total, *part.shape[1:])
        whole[ctx.rows] = part
        return sum_(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient[ctx.rows], None, None, None


class _Part(TorchFunctionMode):
    """While it is active, what looks at a whole batch does so although this process holds a part of it.

    (torch.nn.SyncBatchNorm has no CPU form, and on a GPU it makes the host wait in every layer.)
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
        if not training:
            return x
        if len(x) != self.rows.stop - self.rows.start:
            raise ValueError(f"dropout of {len(x)} rows for {self.rows.stop - self.rows.start} images of this process")
        # In the memory order of x, in which the numbers are drawn.
        nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if nhwc else torch.contiguous_format
        whole = torch.empty(self.total, *x.shape[1:], dtype=x.dtype, device=x.device, memory_format=order).fill_(1)
        mask = function(whole, p, True)[self.rows]
        return x.mul_(mask) if inplace else x * mask


class _BatchNorm(Function):
    """Batch norm (N, C, …) by the mean and variance over all processes' samples; any of them may have none.

    Each process puts its mean, variance and count into a table that all then read; the parts are joined as in Chan,
    Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 1983. Also returns
    the mean (C,) and the unbiased variance (C,).
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
        if x.numel():  # as if mean and variance were constants
            kernel, scale = torch.ops.aten.native_batch_norm_backward, weight.to(mean)
            direct, to_weight, to_bias = kernel(
                gradient, x, scale, mean, variance, None, None, False, ctx.eps, [True] * 3
            )
        else:
            direct, to_weight, to_bias = torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
        along, level = (ctx.sum_(torch.stack([to_weight, to_bias])) / count).unbind()
        # What comes through mean and variance: weight/σ (mean(dy) + x̂ mean(dy x̂)), with the means over all samples.
        precision = (variance + ctx.eps).rsqrt()
        factor = weight.to(mean) * precision
        slope = factor * precision * along
        through = torch.addcmul((factor * level).view(shape), x - mean.view(shape), slope.view(shape))
        return (direct - through).to(x.dtype), to_weight.to(weight), to_bias.to(weight), None, None, None, None
