"""A user's own loss from a user's own file: the `MultiTaskLoss` of the CIFAR-100 loss-combination benchmark, unchanged.

The class is an nn.Module whose `forward(fine_loss, coarse_loss, epoch, total_epochs)` – one scalar a task in task
order, then the progress – returns the scalar to minimise. Its parameters join the optimizer with the optimizer's
own learning rate and weight decay, as they do in that benchmark.
"""

import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from mtl.config.source import definition
from mtl.losses.base import LossWeighting

log = logging.getLogger("mtl")

# What takes a number out of its graph, as it is usually written.
CUTS = re.compile(
    r"torch\.(as_)?tensor\(|\.detach\(|\.item\(|\.tolist\(|\.numpy\(|\.data\b|float\(|no_grad\(|np\.|\.requires_grad"
)


class Custom(LossWeighting):
    """L = module(L_1, …, L_T, epoch, total_epochs).

    Args:
        tasks: number or names of the tasks.
        file: path of the .py file.
        class_name: the class in it.
        args: keyword arguments of its constructor.
        lr, weight_decay: of its parameters; None follows the optimizer's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not load, or holds no nn.Module of that name, or its forward takes another number
            of losses than there are tasks.
    """

    uses_progress = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        file: str,
        class_name: str = "MultiTaskLoss",
        args: Mapping[str, Any] | None = None,
        lr: Annotated[float, Ge(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] | None = None,
    ):
        super().__init__(tasks)
        self.lr, self.weight_decay = lr, weight_decay
        cls = _load_class(Path(file), class_name)
        try:
            self.module = cls(**(args or {}))
        except Exception as error:
            raise ValueError(f"file: {class_name} in {file} cannot be built: {_named(error)}") from error
        try:
            inspect.signature(self.module.forward).bind(*range(self.tasks), 0, 1)
        except TypeError as error:
            raise ValueError(
                f"file: {class_name}.forward in {file} must take {self.tasks} losses "
                f"({', '.join(self.names)}), epoch and total_epochs: {error}"
            ) from error
        self._unused: set[int] | None = set(range(self.tasks))  # losses that no total has depended on; None: said so
        self._asked = False  # whether this process, which may have resumed a run, has made a total

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        # Copies: the user may add to a loss in place, and the losses themselves must stay as they are.
        copies = [loss.clone() for loss in losses.unbind()]
        marks = [copy.grad_fn for copy in copies]
        total = self.module(*copies, self.epoch, self.epochs)
        if not isinstance(total, Tensor):
            wrong = type(total).__name__
        elif total.numel() != 1:
            wrong = f"{total.numel()} numbers"
        elif losses.requires_grad and not (found := _reached(total, marks)):
            wrong = f"a number that does not depend on the losses{self._cut()}"
        else:
            if losses.requires_grad and self._unused:
                self._unused, self._asked = self._unused - found, True
            return total.reshape(())
        where = definition(type(self.module).forward)
        name = type(self.module).__name__
        raise TypeError(f"{name}.forward returned {wrong} (it is defined in {where}); one scalar tensor is needed")

    def epoch_start(self, epoch: int, epochs: int, seed: int | None = None) -> None:
        super().epoch_start(epoch, epochs, seed)
        if self.calls.epoch_starts > 1 and self._asked:
            self._warn()

    def _warn(self) -> None:
        """Say once which losses were not used: right for a loss that trains fewer tasks, else a mistake."""
        if self._unused:
            unused = ", ".join(self.names[i] for i in sorted(self._unused))
            where = definition(type(self.module).forward)
            log.info(f"WARNING   {where}: the total never depends on the loss of {unused}, which is not trained")
        self._unused = None

    def _cut(self) -> str:
        """Where the graph was probably cut."""
        try:
            lines, first = inspect.getsourcelines(type(self.module).forward)
        except OSError:
            return ""
        for number, line in enumerate(lines, first):
            if CUTS.search(line.partition("#")[0]):
                return f", so nothing would be trained: line {number} (`{line.strip()}`) takes them out of the graph"
        return ", so nothing would be trained"


def _reached(total: Tensor, marks: Sequence[Any]) -> set[int]:
    """Which of the graph's nodes `marks` the total depends on. No kernel runs for it."""
    places = {mark: i for i, mark in enumerate(marks) if mark is not None}
    found, seen, waiting = set(), set(), [total.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in places:
            found.add(places[node])
        else:
            waiting.extend(following for following, _ in node.next_functions)
    return found


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _load_class(file: Path, name: str) -> type[nn.Module]:
    if not file.is_file():
        raise FileNotFoundError(f"file: {file} does not exist (looked in {Path.cwd()})")
    # Registered under a name of its own, so that classes in the file pickle and tracebacks show its lines.
    spec = importlib.util.spec_from_file_location(f"mtl_custom_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"file: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"file: {file} does not load: {_named(error)}") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"file: {file} holds no nn.Module class named {name}")
    return cls
