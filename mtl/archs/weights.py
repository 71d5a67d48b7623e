"""Weights that a backbone starts from: a file, or a run of this project. Tensors are read, and no code is run."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

HOLDERS = ("model", "state_dict", "model_state_dict")  # the keys under which checkpoints keep a network's weights
PREFIXES = ("", "module.", "backbone.network.", "network.", "backbone.", "model.")

_replaced: ContextVar[bool] = ContextVar("weights are replaced", default=False)


@contextmanager
def replaced() -> Iterator[None]:
    """Networks that are built in this block get their weights from a checkpoint afterwards: nothing is downloaded."""
    token = _replaced.set(True)
    try:
        yield
    finally:
        _replaced.reset(token)


def wanted(weights: str | None) -> bool:
    """Whether a network has to look for the weights that its config names."""
    return weights is not None and not _replaced.get()


def read(source: str) -> dict[str, Tensor]:
    """The weights in a file, or in the best.pt (else last.pt) of a run's folder.

    Raises:
        ValueError: there is no such file, or it holds anything but weights; the message begins with "weights".
    """
    path = Path(source)
    if path.is_dir():
        found = [file for file in (path / "best.pt", path / "last.pt") if file.is_file()]
        if not found:
            raise ValueError(f"weights: the folder {source} holds neither best.pt nor last.pt, as a run's folder does")
        path = found[0]
    try:
        if zipfile.is_zipfile(path):  # torch.load does not compare the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"weights: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # every reader of zip files and pickles has its own errors for damaged ones
        raise ValueError(f"weights: {path} is damaged, or holds more than tensors, which is not run") from error
    held = [content[key] for key in HOLDERS if isinstance(content, dict) and isinstance(content.get(key), Mapping)]
    state = held[0] if held else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {path} holds no weights by name, as torch.save(network.state_dict(), …) writes")
    return dict(state)


def start_from(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give a network without its classifier the weights of `state`; what it lacks of these, the classifier, is left.

    A first convolution for another number of channels is converted, see `channels`.

    Raises:
        ValueError: a weight is missing or of another shape; the message begins with "weights".
    """
    own = network.state_dict()
    views = [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in PREFIXES]
    state = max(views, key=lambda view: len(view.keys() & own.keys()))
    first = first_convolution(network)
    if first and (key := f"{first}.weight") in state and state[key].ndim == 4 == own[key].ndim:
        state[key] = channels(state[key], own[key].shape[1])
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            shapes = f"the shape {tuple(state[key].shape)}, and the network {tuple(value.shape)}"
            raise ValueError(f"weights: {source} is of another network: {key} has {shapes}")
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"weights: {source} is of another network: it lacks {missing[0]}{more}")
    network.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


def first_convolution(network: nn.Module) -> str:
    """The name of the convolution that sees the image; empty where there is none."""
    return next((name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)), "")


def channels(weight: Tensor, number: int) -> Tensor:
    """A convolution's weight (out, in, h, w) for images of `number` channels.

    Grey images get the sum over the channels: what the network sees of a grey image in three equal channels. Otherwise
    the channels repeat, scaled so that the outputs keep their size.
    """
    have = weight.shape[1]
    if number == have:
        return weight
    if number == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-number // have), 1, 1)[:, :number]
    return repeated * (have / number)
