"""What only a GPU can show. Skipped where there is none."""

import pytest
import torch
from conftest import ROOT

from mtl.config import schema
from mtl.engine import trainer as trainer_module

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def learner_on_gpu(loss: str, precision: str):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from mtl.data.batches import TrainingBatches
    from mtl.engine.run import build_learner

    GlobalHydra.instance().clear()
    overrides = ["data=synthetic", "data.train_size=1024", f"loss={loss}", f"trainer.precision={precision}"]
    overrides += [NEEDED[loss]] if loss in NEEDED else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True)
    benchmark = schema.build(config["data"], "data")
    strategy = schema.build(config["loss"], "loss", tasks=["fine", "coarse"])
    tasks = [t for t in benchmark.tasks if t.name in strategy.names]
    trainer = schema.build(config["trainer"], "trainer")
    device = torch.device("cuda")
    learner = build_learner(config, benchmark, tasks, strategy, trainer, device)
    return learner, TrainingBatches(benchmark.splits()["train"], benchmark, device, seed=0)


# An eigendecomposition on a GPU makes the host wait: torch checks its result.
WAITING = ("aligned_mtl", "config", "imtl", "imtl_g")
NEEDED = {
    "static": "loss.weights={fine: 2}",
    "single": "loss.task=fine",
    "pivrg": "loss.baselines={fine: 60, coarse: 70}",
    "amtl": "loss.potentials={fine: 60, coarse: 70}",
}
LOSSES = sorted({f.stem for f in (ROOT / "conf" / "loss").glob("*.yaml")} - {"custom", *WAITING})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_waits_for_the_device(loss, precision, monkeypatch):
    """A host synchronisation anywhere in the epoch is an error, up to the one read at its end."""
    learner, batches = learner_on_gpu(loss, precision)
    learner.train_epoch(batches, 0)  # cuDNN's benchmark mode and lazy initialisation may wait
    read = trainer_module.Sums.read

    def read_at_the_end(sums):
        torch.cuda.set_sync_debug_mode("default")
        return read(sums)

    monkeypatch.setattr(trainer_module.Sums, "read", read_at_the_end)
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = learner.train_epoch(batches, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert row["train/fine_loss"] > 0
