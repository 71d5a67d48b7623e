"""The device and the precision of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn

from mtl.data.columns import Batch
from mtl.engine.stages import read_stages
from mtl.errors import SetupError
from mtl.random import alone


@dataclass
class Execution:
    """How a run is executed.

    Args:
        epochs: passes over the training data.
        patience: stop after so many epochs without a better validation result; None: never. See `mtl.engine.stopping`.
        device: auto is the first GPU, if there is one.
        precision: fp32, or bf16 autocast (parameters, gradients and losses stay fp32).
        channels_last: the memory layout of images and convolutions.
        deterministic: use only deterministic GPU kernels. A CPU run is bit-reproducible anyway.
        pictures: test samples that are drawn after the epochs 1, 2, 4, 8, … and the last one; 0 for none. See
            `mtl.engine.pictures`.
        stages: the stages of the training, as in `mtl.engine.stages`; empty for one stage with all epochs.
        backbone_lr_factor: learning rate of the shared parameters, as a multiple of the optimizer's. The decoders and
            the method learn at the full rate. For a pretrained backbone, 0.1 is usual.

    Attributes:
        plan: the stages.
    """

    epochs: Annotated[int, Ge(1)] = 200
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    deterministic: bool = False
    stages: Sequence[Any] = ()
    backbone_lr_factor: Annotated[float, Gt(0)] = 1.0
    pictures: Annotated[int, Ge(0)] = 4
    patience: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        name, _, index = self.device.partition(":")
        if name not in ("auto", "cpu", "cuda", "mps") or (index and not (name == "cuda" and index.isdigit())):
            raise ValueError(f"device: {self.device!r} is none of auto, cpu, cuda, cuda:N, mps")
        self.plan = read_stages(self.stages, self.epochs)

    def open_device(self) -> torch.device:
        """The device to train on.

        Raises:
            SetupError: this machine has no such device.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device(name)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.type == "cuda" and (device.index or 0) >= count:
            shown = f"this machine shows {count} CUDA devices"
            raise SetupError(f"trainer.device={self.device}: {shown}; use trainer.device=auto or cpu")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise SetupError("trainer.device=mps: not available on this machine; use trainer.device=auto or cpu")
        if self.deterministic:
            # Without this, torch refuses every matrix product in a deterministic run. cuBLAS reads it only once, at its
            # first use in the process. So it cannot be reset after the run.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return device

    @contextmanager
    def flags(self) -> Iterator[None]:
        """Set torch's global flags for this run, and put them back after the block: another run may need others."""
        with alone():
            deterministic = torch.are_deterministic_algorithms_enabled()
            warns, benchmark = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
            torch.use_deterministic_algorithms(self.deterministic)
            torch.backends.cudnn.benchmark = not self.deterministic
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(deterministic, warn_only=warns)
                torch.backends.cudnn.benchmark = benchmark

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move the model to the device, in this trainer's memory layout."""
        return model.to(device, memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def slow_precision(self, device: torch.device) -> bool:
        """Whether bf16 is emulated on this device. On an AVX2 CPU it takes about ten times as long as fp32."""
        return device.type == "cpu" and self.precision == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2"

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The autocast context of the forward pass; it does nothing for fp32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def laid_out(self, batch: Batch) -> Batch:
        """The batch, with its images (N, C, H, W) in this trainer's memory layout."""
        # Images already are in channels_last order: see `mtl.data.inputs.Image`. Only the other layout needs a copy.
        return batch if self.channels_last else {name: value.contiguous() for name, value in batch.items()}
