"""A run that has left the finite numbers stops within its epoch, and says where."""

import json
import math
import re

import pytest
import torch

from mtl.engine.divergence import Alarm
from mtl.errors import Diverged
from mtl.losses import LossWeighting

NET = ("arch._target_=golden.problems.Net", "~arch.depth", "data=digits", "data.batch_size=8", "data.limit_train=80",
       "data.limit_test=16", "trainer.epochs=3", "trainer.device=cpu", "logger=none")  # fmt: skip


class Late(LossWeighting):
    """Equal weighting, but in the third step of the second epoch the odd task's weight is infinite."""

    def __init__(self, tasks):
        super().__init__(tasks)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, losses):
        self.steps += 1
        return (losses * torch.where(self.steps == 13, torch.tensor([1.0, math.inf, 1.0]), 1.0)).sum()


def test_the_run_stops_at_the_step(cli, tmp_path):
    """Step 13 is the third of the second epoch's ten; the gradient is the first number that is not finite."""
    result = cli(*NET, f"loss._target_={__name__}.Late", f"output_root={tmp_path}")
    assert result.code == 1 and re.fullmatch(
        r"error: net-late-s42-\w+: gradient norm became (nan|inf) in epoch 2, at step 3 with Late "
        r"\(last.pt holds the epoch before\); try a smaller .*\n", result.err
    ), result.err  # fmt: skip
    (folder,) = {file.parent for file in tmp_path.rglob("run.json")}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((folder / "run.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_task_is_named(value):
    alarm = Alarm(["a", "b"], 0, "PCGrad")
    fine, norm = torch.tensor(1.0), torch.tensor(2.0)
    for _ in range(4):
        alarm.see([fine, fine], norm)
    with pytest.raises(Diverged, match=re.escape(f"b loss became {value} in epoch 1, at step 5 with PCGrad")):
        alarm.see([fine, torch.tensor(value)], torch.tensor(math.nan))


def test_at_the_first_step_no_rate_is_to_blame():
    with pytest.raises(Diverged) as caught:
        Alarm(["a"], 0, "Equal").see([torch.tensor(math.nan)], torch.tensor(1.0))
    assert "labels" in caught.value.cure and "optimizer.lr" not in caught.value.cure


def test_a_task_that_does_not_count_raises_no_alarm():
    alarm, counts = Alarm(["a", "b"], 0, "Equal"), torch.tensor([True, False])
    alarm.see([torch.tensor(1.0), torch.tensor(math.nan)], torch.tensor(1.0), counts)
    with pytest.raises(Diverged, match="a loss"):
        alarm.see([torch.tensor(math.nan), torch.tensor(math.nan)], torch.tensor(1.0), counts)
