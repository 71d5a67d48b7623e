"""A split without any label of a task: training goes on, and a line says what that means for the results."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mtl import evaluate
from mtl.data.base import Split
from mtl.data.digits import Digits

SMALL = ("data._target_=test_unlabelled.Without", "data.limit_train=32", "data.limit_test=20", "data.batch_size=32",
         "arch.depth=10", "arch.width=1", "trainer.epochs=1", "trainer.device=cpu", "logger=none")  # fmt: skip


@dataclass
class Without(Digits):
    """Digits; `lacks` names splits and tasks, as in "test: odd ink"."""

    lacks: str = ""

    def load(self) -> dict[str, Split]:
        split, _, tasks = self.lacks.partition(":")
        columns = super().load()
        for name, loaded in columns.items():
            labels = {task: loaded.columns[task].clone() for task in tasks.split() if name == split}
            for column in labels.values():
                column.fill_(torch.nan if column.is_floating_point() else -100)
            columns[name] = Split({**loaded.columns, **labels}, loaded.rows)
        return columns


def warnings(result) -> list[str]:
    return [line.removeprefix("WARNING   ") for line in result.out.splitlines() if line.startswith("WARNING")]


@pytest.mark.parametrize("options, lines", [
    (("+data.lacks='test: digit odd'",), [
        "no test sample has a label of digit, odd: nan in the test results, and test/digit_accuracy cannot choose "
        "the best epoch: the first one counts as the best"]),
    (("+data.lacks='train: odd ink'", "data.val_fraction=0.3"), [
        "no training sample has a label of odd, ink: untrained in this run",
        "no validation sample has a label of odd, ink: nan in the val results"]),
])  # fmt: skip
def test_a_split_without_any_label_of_a_task_is_named(cli, capfd, options, lines):
    torch.set_num_threads(1)
    result = cli("data=digits", "arch=wide_resnet", *SMALL, *options)
    assert result.code == 0 and warnings(result) == lines, result.err
    (run,) = Path("outputs").rglob("run.json")
    if "test: digit odd" in options[0]:  # the evaluation of a finished run says it, too
        assert evaluate.main([str(run.parent)]) == 0
        assert capfd.readouterr().err == "WARNING: no test sample has a label of digit, odd\n"
