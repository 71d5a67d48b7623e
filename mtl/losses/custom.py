"""A user's own loss from a user's own file: the `MultiTaskLoss` of the CIFAR-100 loss-combination benchmark, unchanged.

The class is an nn.Module with `forward(fine_loss, coarse_loss, epoch, total_epochs)`: one scalar per task in task
order, then the progress. It returns the scalar to minimise. Its parameters join the optimizer, with the optimizer's
own learning rate and weight decay, as in that benchmark.
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

# The usual ways to write code that takes a number out of its graph. Only used to name the likely line in an error.
CUTS = re.compile(
    r"torch\.(as_)?tensor\(|\.detach\(|\.item\(|\.tolist\(|\.numpy\(|\.data\b|float\(|no_grad\(|np\.|\.requires_grad"
)


class Custom(LossWeighting):
    """L = module(L_1, …, L_T, epoch, total_epochs).

    Args:
        file: path of the .py file.
        class_name: name of the class in the file.
        args: keyword arguments of the class's constructor.
        lr, weight_decay: learning rate and weight decay of its parameters; None uses the optimizer's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not load or holds no nn.Module of that name. Also if its forward takes another number
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
        # Losses that no total has depended on so far; None after the warning about them.
        self._unused: set[int] | None = set(range(self.tasks))
        self._asked = False  # whether this process has computed a total; a resumed run starts with False

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        # The user's code gets copies, because it may change a loss in place.
        copies = [loss.clone() for loss in losses.unbind()]
        marks = [copy.grad_fn for copy in copies]  # if the total's graph reaches such a node, it depends on that loss
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
        # After a whole epoch: a loss that is used in some steps only must not give a warning.
        if self.calls.epoch_starts > 1 and self._asked:
            self._warn()

    def _warn(self) -> None:
        """Log once which losses were not used. It may be intended (fewer tasks), and is otherwise a mistake."""
        if self._unused:
            unused = ", ".join(self.names[i] for i in sorted(self._unused))
            where = definition(type(self.module).forward)
            log.info(f"WARNING   {where}: the total never depends on the loss of {unused}, which is not trained")
        self._unused = None

    def _cut(self) -> str:
        """The line that probably cut the graph, as the end of an error message."""
        try:
            lines, first = inspect.getsourcelines(type(self.module).forward)
        except OSError:
            return ""
        for number, line in enumerate(lines, first):
            if CUTS.search(line.partition("#")[0]):
                return f", so nothing would be trained: line {number} (`{line.strip()}`) takes them out of the graph"
        return ", so nothing would be trained"


def _reached(total: Tensor, marks: Sequence[Any]) -> set[int]:
    """The indices of the graph's nodes `marks` that the total depends on. No kernel runs for this search."""
    places = {mark: i for i, mark in enumerate(marks) if mark is not None}
    # A search over the graph, from the total backwards. Behind a mark nothing is searched: a loss's own graph is large.
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
    # The module is registered in sys.modules. Otherwise classes in the file could not be pickled.
    spec = importlib.util.spec_from_file_location(f"mtl_custom_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"file: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    # A script may end with sys.exit(); that must not end the training command.
    except (Exception, SystemExit) as error:
        raise ValueError(f"file: {file} does not load: {_named(error)}") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"file: {file} holds no nn.Module class named {name}")
    return cls
