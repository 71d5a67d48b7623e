"""The golden runs: {family: {case: overrides of the command line}}. A family is a file, `<family>.json`."""

import os
from pathlib import Path

import shipped

FOLDER = Path(__file__).parent

# An epoch has three steps of 8 samples: the least in which a state can go wrong between steps, and seconds per run.
SIZES = ("data.batch_size=8", "data.limit_train=24", "data.limit_test=16", "logger=none", "trainer.device=cpu")
NET = ("arch._target_=golden.problems.Net", "~arch.depth", "optimizer.lr=0.05")
DIGITS = ("data=digits", *SIZES)
MISSING = (*DIGITS, "data._target_=golden.problems.Missing")
CLASSES = ("data._target_=golden.problems.Classes",)
ALONE = (*DIGITS, "data._target_=golden.problems.Alone")
SYNTHETIC = ("data=synthetic", "data.train_size=24", "data.test_size=16", *SIZES)
ROOMS = ("data=rooms", "data.train_size=24", "data.test_size=16", *SIZES)
MOLECULES = ("data=molecules", "data.train_size=24", "data.test_size=16", *SIZES)

# Arguments without a default, for the methods that need them.
NEEDED = {
    "amtl": ("loss.potentials={digit: 60, odd: 80, ink: 0.5}",),
    "dtp": CLASSES,
    "custom": (f"loss.file={FOLDER / 'own_loss.py'}",),
    "pivrg": ("loss.baselines={digit: 60, odd: 80, ink: 0.5}",),
    "single": ("loss.task=odd",),
    "static": ("loss.weights={digit: 1, odd: 0.5, ink: 2}",),
}


def options(group: str) -> list[str]:
    """The shipped ones; with GOLDEN, which writes traces, those that git does not track yet, too."""
    if os.environ.get("GOLDEN"):
        return sorted(file.stem for file in (shipped.ROOT / "conf" / group).glob("*.yaml"))
    return shipped.options(group)


def _losses(*more: str) -> dict[str, tuple[str, ...]]:
    return {name: (*NET, f"loss={name}", *NEEDED.get(name, ()), *more) for name in options("loss")}


def _archs() -> dict[str, tuple[str, ...]]:
    names = [name for name in options("arch") if name != "timm"]  # an extra, which need not be there
    cases = {name: (*DIGITS, f"arch={name}", "optimizer.lr=0.01", "trainer.epochs=2") for name in names}
    cases["mlp"] += ("arch.width=16",)
    # These are large, and most of the time goes into writing checkpoints. So one epoch, and no momenta to save.
    cases["torchvision"] += ("arch.name=shufflenet_v2_x0_5",)
    for name in ("resnet18", "torchvision", "vgg16_bn"):
        cases[name] += ("optimizer.momentum=0", "trainer.epochs=1")
    cases["vgg16_bn"] = (*SYNTHETIC, *cases["vgg16_bn"][len(DIGITS) :], "data.batch_size=4", "data.limit_train=8")
    cases["wide_resnet"] += ("arch.width=1", "arch.dropout=0.3")
    cases["fcn"] = (*ROOMS, "data.height=16", "data.width=24", *cases["fcn"][len(DIGITS) :], "arch.width=4")
    for name in ("segnet", "segnet_mtan", "unet", "deeplabv3", "deeplabv3plus"):
        # Two tasks and one epoch, since such a network has hundreds of tensors, each with a line in the trace.
        depth = ("arch.depth=18",) if name.startswith("deeplab") else ()
        pair = (*ROOMS, "data._target_=golden.problems.Pair", "data.height=32", "data.width=40")
        cases[name] = (*pair, f"arch={name}", "arch.width=2", *depth, "optimizer.lr=0.01", "trainer.epochs=1")
    boxes = ("data=boxes", "data.train_size=24", "data.test_size=16", "data.size=32", *SIZES, "arch=retina")
    small = ("arch.name=squeezenet1_1", "arch.width=2", "arch.levels=[2,3]", "arch.head_layers=1")
    cases["retina"] = (*boxes, *small, "optimizer.lr=0.01", "trainer.epochs=1")
    for name in ("mpnn", "nnconv"):
        cases[name] = (*MOLECULES, f"arch={name}", "optimizer.lr=0.01", "trainer.epochs=2")
    cases["mpnn"] += ("arch.width=8",)
    cases["point"] = ("experiment=toy", "data.steps=3", "trainer.epochs=7", "trainer.device=cpu")
    return cases


def _variants() -> dict[str, tuple[str, ...]]:
    digits = (*NET, *DIGITS, "trainer.epochs=7")
    few = (*NET, *DIGITS, "trainer.epochs=3")
    cases = {
        "features-mgda": (*digits, "loss=mgda", "step.gradients=features"),
        "features-pcgrad": (*digits, "loss=pcgrad", "step.gradients=features"),
        "features-missing-cagrad": (*NET, *MISSING, "trainer.epochs=3", "loss=cagrad", "step.gradients=features"),
        "log-equal": (*digits, "step.transform=log"),
        "log-dwa": (*digits, "loss=dwa", "step.transform=log"),
        "log-moml": (*digits, "loss=moml", "step.transform=log"),
        "norm-uncertainty": (*digits, "loss=uncertainty", "step.scale=norm"),
        "norm-graddrop": (*digits, "loss=graddrop", "step.scale=norm"),
        "norm-features-mgda": (*digits, "loss=mgda", "step.scale=norm", "step.gradients=features"),
        "sum-pcgrad": (*digits, "loss=pcgrad", "step.scale=sum"),
        "sum-uncertainty": (*digits, "loss=uncertainty", "step.scale=sum"),
        "heads-own-uncertainty": (*digits, "loss=uncertainty", "step.heads=own"),
        "heads-weighted-mgda": (*digits, "loss=mgda", "step.heads=weighted"),
        "adam": (*digits, "optimizer=adam", "loss=gradnorm"),
        "adamw": (*digits, "optimizer=adamw"),
        "signsgd": (*digits, "optimizer=signsgd", "loss=dwa"),
        "adatask-missing": (*NET, *MISSING, "trainer.epochs=3", "optimizer=adatask", "loss=dwa"),
        "mtl_io-missing": (*NET, *MISSING, "trainer.epochs=3", "optimizer=mtl_io"),
        "validation-amtl": (*digits, "loss=amtl", *NEEDED["amtl"], "data.val_fraction=0.33"),
        "validation-dtp": (*digits, "loss=dtp", *CLASSES, "data.val_fraction=0.33"),
        "microscope-pcgrad": (*few, "loss=pcgrad", "microscope.every=2"),
        "microscope-missing": (*NET, *MISSING, "trainer.epochs=3", "microscope.every=1", "loss=gradvac"),
        "last-batch": (*few, "data.batch_size=9"),
        "contiguous": (*few, "trainer.channels_last=false"),
        "seed-0": (*few, "seed=0", "loss=rlw"),
        "augmented": (*NET, *SYNTHETIC, "trainer.epochs=3"),
        "augmented-modo": (*NET, *SYNTHETIC, "trainer.epochs=3", "loss=modo"),
        "host": (*few, "data.residency=host", "data.workers=0"),
        "host-augmented": (*NET, *SYNTHETIC, "trainer.epochs=3", "data.residency=host", "data.workers=0"),
    }
    for name in ("adagrad", "adam", "rmsprop", "sgd"):
        cases[f"adatask-{name}"] = (*few, "optimizer=adatask", f"optimizer.base={name}")
        cases[f"mtl_io-{name}"] = (*few, "optimizer=mtl_io", f"optimizer.base={name}")
    for name in options("schedule"):
        more = {"multistep": ("schedule.milestones=[1,2]",), "step": ("schedule.every=1",)}.get(name, ())
        cases[f"schedule-{name}"] = (*few, f"schedule={name}", *more)
    cases["warmup"] = (*few, "schedule.warmup_epochs=1", "schedule.interval=step")
    for name in ("equal", "pcgrad", "mgda", "uncertainty", "gradnorm", "nash_mtl", "famo", "modo", "moml", "graddrop"):
        cases[f"alone-{name}"] = (*NET, *ALONE, "trainer.epochs=2", f"loss={name}")
    return cases


def _sharing() -> dict[str, tuple[str, ...]]:
    tiny = (*ROOMS, "data._target_=golden.problems.Pair", "data.height=16", "data.width=24", "arch=fcn", "arch.width=1")
    usual = (*tiny, "optimizer.lr=0.01", "trainer.epochs=2", "loss=pcgrad")
    names = [name for name in options("sharing") if name != "hard"]
    cases = {name: (*usual, f"sharing={name}") for name in names}
    cases["mmoe"] += ("step.gradients=features",)
    return cases


# These runs are in float32, because the point's coordinates always are. All others are in float64.
SINGLE = {("archs", "point")}

# losses: every method. missing: every method, on data that lacks labels. archs: every network. sharing:
# every scheme. variants: switches,
# optimizers, schedules, and other options.
FAMILIES = {
    "losses": {name: (*DIGITS, "trainer.epochs=7", *case) for name, case in _losses().items()},
    "missing": {name: (*MISSING, "trainer.epochs=3", *case) for name, case in _losses().items()},
    "archs": _archs(),
    "sharing": _sharing(),
    "variants": _variants(),
}
