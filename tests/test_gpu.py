"""What only a GPU can show. Skipped where there is none."""

import pytest
import shipped
import torch
from conftest import ROOT

from mtl.losses import host
from mtl.metrics.tally import Tally

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def learner_on(device: str, loss: str, *overrides: str, images: int = 1024):
    """What `train.py trainer.device=<device> loss=<loss>` trains, and its training batches."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from mtl.data.batches import TrainingBatches
    from mtl.engine.build import assemble

    GlobalHydra.instance().clear()
    words = ["data=synthetic", f"data.train_size={images}", f"loss={loss}", f"trainer.device={device}", *overrides]
    words += [NEEDED[loss]] if loss in NEEDED else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", words), resolve=True)
    benchmark, learner = assemble(config)
    return learner, TrainingBatches(benchmark.splits()["train"], benchmark, learner.device, seed=0)


NEEDED = {
    "static": "loss.weights={fine: 2}",
    "single": "loss.task=fine",
    "pivrg": "loss.baselines={fine: 60, coarse: 70}",
    "amtl": "loss.potentials={fine: 60, coarse: 70}",
}
# RotoGrad takes torch.matrix_exp, which reads the norms of its matrices on the CPU.
LOSSES = sorted({*shipped.options("loss")} - {"custom", "rotograd"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_waits_for_the_device_but_for_a_small_problem(loss, precision, monkeypatch):
    """A host synchronisation anywhere in the epoch is an error. Two are allowed: the read at the end of the epoch, and
    one copy a step to the CPU, for a method that solves its small problem there."""
    learner, batches = learner_on("cuda", loss, f"trainer.precision={precision}")
    # The first epoch may wait: cuDNN's benchmark mode and lazy initialisation do.
    learner.epoch_end(learner.train_epoch(batches, 0))
    read, fetched, copies = Tally.read, host.fetched, []

    def read_at_the_end(tally):
        torch.cuda.set_sync_debug_mode("default")
        return read(tally)

    def fetched_once_a_step(tensors):
        copies.append(len(tensors))
        torch.cuda.set_sync_debug_mode("default")
        found = fetched(tensors)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(Tally, "read", read_at_the_end)
    monkeypatch.setattr(host, "fetched", fetched_once_a_step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = learner.train_epoch(batches, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(copies) in (0, len(batches))
    assert 0 < row["train/fine_loss"] < 10  # ln 100 = 4.6
    assert all(p.isfinite().all() for p in learner.model.parameters())


def test_rotograd_which_waits_trains_all_the_same():
    learner, batches = learner_on("cuda", "rotograd")
    row = learner.train_epoch(batches, 0)
    assert 0 < row["train/fine_loss"] < 10
    assert all(p.isfinite().all() for p in learner.model.parameters())


@pytest.mark.parametrize("loss", ["equal", "pcgrad"])
def test_a_deterministic_run_has_the_same_bits_twice(loss):
    try:
        ends = []
        for _ in range(2):
            learner, batches = learner_on("cuda", loss, "trainer.deterministic=true", "seed=3")
            learner.train_epoch(batches, 0)
            ends.append([p.detach().cpu() for p in learner.model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_first_steps_agree_with_the_cpu():
    """Up to TF32, in which cuDNN convolves."""
    rows = []
    for device in ("cpu", "cuda"):
        learner, batches = learner_on(device, "equal", images=256)
        rows.append(learner.train_epoch(batches, 0))
    for key in ("train/fine_loss", "train/coarse_loss"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=0.02)
