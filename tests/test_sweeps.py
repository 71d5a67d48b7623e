"""Sweep files, the protocol and Optuna: every point is a config that mtl accepts; searches look at validation data."""

import itertools
import json
import math
import random
import re
from dataclasses import asdict
from functools import cache

import pytest
import shipped
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from mtl.config.identity import identify
from mtl.engine.build import check
from mtl.engine.learner import Learner
from mtl.engine.replay import objective
from mtl.errors import ConfigError
from mtl.studies import tuned_rates

FILES = shipped.files("sweeps/*.yaml")
SMALL = ("experiment=smoke", "data.train_size=64", "data.test_size=32", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "trainer.epochs=1")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def hydra():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def points(sweep: dict) -> list[dict]:
    """All points of a grid, 100 of a random or Bayesian search."""
    parameters = sweep["parameters"]
    if sweep["method"] == "grid":
        return [
            dict(zip(parameters, p, strict=True))
            for p in itertools.product(*(v["values"] for v in parameters.values()))
        ]
    draw = random.Random(0)
    assert {p["distribution"] for p in parameters.values()} == {"log_uniform_values"}
    ends = {key: (math.log(p["min"]), math.log(p["max"])) for key, p in parameters.items()}
    return [{key: math.exp(draw.uniform(*end)) for key, end in ends.items()} for _ in range(100)]


def words(sweep: dict, point: dict) -> list[str]:
    """The arguments that W&B's agent gives train.py."""
    known = create_sweep_command_args({"args": {key: {"value": value} for key, value in point.items()}})
    known |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    given = [known[c[2:-1]] if c.startswith("${") else [c] for c in create_sweep_command(list(sweep["command"]))]
    command = list(itertools.chain(*given))
    assert command[:3] == ["/usr/bin/env", "python", "train.py"]
    return command[3:]


@cache
def composed(chosen: tuple[str, ...]):
    return compose("config", list(chosen))


def config_of(arguments: list[str]) -> dict:
    """What `compose` makes of them, in a hundredth of the time: numbers are put into a composed config afterwards."""
    number = re.compile(r"(seed|optimizer\.lr|loss\.weights\.coarse)=\d").match
    split = next(i for i in range(len(arguments), 0, -1) if not number(arguments[i - 1]))
    late = OverridesParser.create().parse_overrides(arguments[split:])
    config = composed(tuple(arguments[:split])).copy()
    for override in late:
        assert OmegaConf.select(config, override.key_or_group) is not None
        OmegaConf.update(config, override.key_or_group, override.value())
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_point_of_a_sweep_is_a_config(file):
    sweep = yaml.safe_load(file.read_text())
    for point in points(sweep):
        arguments = words(sweep, point)
        check(config_of(arguments))
        # Not "None", "True" and the like, which Hydra takes for strings: numbers and names only.
        assert not [v for v in point.values() if v is None or isinstance(v, (bool, list, dict))]
    assert config_of(arguments) == OmegaConf.to_container(compose("config", arguments), resolve=True)
    assert config_of(arguments)["seed"] == point.get("seed", 0)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_sweep_file_is_what_wandb_expects_and_its_header_says(file):
    jsonschema = pytest.importorskip("jsonschema")
    # From W&B's package "sweeps" 0.3.0, which no longer installs beside a current NumPy.
    schema = json.loads((ROOT / "tests" / "oracles" / "sweep_schema.json").read_text())
    text = file.read_text()
    sweep = yaml.safe_load(text)
    jsonschema.Draft7Validator(schema).validate(sweep)
    assert not list(jsonschema.Draft7Validator(schema).iter_errors({**sweep, "method": "bayes"}))
    runs = len(points(sweep)) if sweep["method"] == "grid" else sweep["run_cap"]
    header = text.partition("program:")[0]
    assert f"{runs} runs" in header and f"wandb sweep sweeps/{file.name}" in header and "Expected" in header
    # A search by rates or weights is judged on validation data, so there must be some.
    fraction = config_of(words(sweep, points(sweep)[0]))["data"]["val_fraction"]
    assert sweep["metric"]["name"] == ("val/fine_accuracy" if fraction else "test/fine_accuracy")
    assert sweep["metric"]["goal"] == "maximize" and (fraction > 0) == ("optimizer.lr" in sweep["parameters"])


def test_a_point_that_is_wrong_is_refused():
    sweep = yaml.safe_load((ROOT / "sweeps" / "bayes.yaml").read_text())
    with pytest.raises(ConfigError, match=r"optimizer.lrr"):
        check(OmegaConf.to_container(compose("config", [*words(sweep, {}), "+optimizer.lrr=1"]), resolve=True))


@pytest.fixture
def train(cli, tmp_path, monkeypatch):
    """`train("equal", "--rates", …)` runs the protocol in-process; `train.grids` are the arguments of its grids."""

    def grid(arguments):
        call.grids.append(arguments)
        code = cli(*arguments).code
        GlobalHydra.instance().clear()
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3").__enter__()
        return code

    def call(*arguments):
        call.grids = []
        return tuned_rates.main([*arguments, *SMALL, f"output_root={tmp_path / 'out'}", "data.val_fraction=0.25"])

    monkeypatch.setattr(tuned_rates, "grid", grid)
    return call


def test_the_protocol_chooses_on_validation_data_and_survives(train, tmp_path, monkeypatch, capfd):
    """Rate 0.02 is best on validation data and worst on test data; 0.05 diverges; a failure is retried."""
    evaluate, train_epoch = Learner.evaluate, Learner.train_epoch
    rate = lambda self: self.optimizer.param_groups[0]["initial_lr"]  # noqa: E731
    broken = [0.01]

    def figures(self, batches, name):
        row, sign = evaluate(self, batches, name), 1 if name == "val" else -1
        return {**row, f"{name}/fine_accuracy": 50 + sign * {0.01: 1, 0.02: 2, 0.05: 3}[rate(self)]}

    def epoch(self, *arguments):
        if rate(self) in broken:
            raise RuntimeError("out of memory")
        row = train_epoch(self, *arguments)
        return {**row, "train/fine_loss": math.nan} if rate(self) == 0.05 else row

    monkeypatch.setattr(Learner, "evaluate", figures)
    monkeypatch.setattr(Learner, "train_epoch", epoch)
    rates = ("--rates", "0.05,0.01,0.02", "--seeds", "1,2")
    assert train("equal", *rates) == 1
    assert "rate 0.01 seed 0 failed; the same command tries again" in capfd.readouterr().err and len(train.grids) == 1
    broken.clear()
    assert train("equal", *rates) == 0
    assert [arguments[-2:] for arguments in train.grids] == [
        ["optimizer.lr=0.01", "seed=0"], ["optimizer.lr=0.02", "seed=1,2"]
    ]  # fmt: skip
    capfd.readouterr()
    assert train("equal", *rates) == 0 and train.grids == []
    out = capfd.readouterr().out
    (row,) = (re.split(r"\s{2,}", line) for line in out.splitlines() if line.startswith("equal "))
    assert row[:6] == ["equal", "0.02", "1", "52", "2", "48.00 ± 0.00"]
    assert "optimizer.lr=0.02 seed=1,2" in out and "may lie beyond" not in out
    (chosen,) = {f.parent for f in (tmp_path / "out").rglob("seed1/summary.json")}
    assert objective(chosen) == 52


@pytest.fixture
def written(tmp_path, monkeypatch):
    """`written(held, "equal", …)` runs the protocol; its grids write runs of one epoch instead of training them.

    `held` has (fine, coarse) on validation data by optimizer and rate; on test data all have 60 and 45, and single
    tasks have 50 everywhere.
    """
    root = tmp_path / "out"

    def write(words, optimizer, rate, seed, values, task=None):
        alone = ["loss=single", f"loss.task={task}"] if task else []
        kept = [w for w in words if not w.startswith(("-m", "optimizer.lr=", "seed=", *(["loss="] if task else [])))]
        config = compose("config", [*kept, *alone, f"optimizer.lr={rate}", f"seed={seed}"], return_hydra_config=True)
        choices = dict(config.hydra.runtime.choices)
        config = {k: v for k, v in OmegaConf.to_container(config).items() if k != "hydra"}
        identity = identify(config, choices)
        folder = identity.directory(root)
        folder.mkdir(parents=True, exist_ok=True)
        metrics = {f"{t}_accuracy": v for t, v in values.items()}
        tests = {f"test/{m}": v[1] for m, v in metrics.items()}
        row = {"epoch": 1, **tests, **{f"val/{m}": v[0] for m, v in metrics.items()}}
        summary = {
            "epochs": 1, "last": tests, "best": {k: {"value": v, "epoch": 1} for k, v in tests.items()},
            "higher_is_better": dict.fromkeys(tests, True), "tasks": {t: [f"{t}_accuracy"] for t in values},
            "selected": {"by": f"val/{next(iter(metrics))}", "epoch": 1, **tests},
        }  # fmt: skip
        info = {**asdict(identity), "group": identity.group, "status": "finished", "choices": choices,
                "finished": "2026-01-01T00:00:00+00:00"}  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        for name, content in (("run.json", info), ("metrics.jsonl", row), ("summary.json", summary)):
            (folder / name).write_text(json.dumps(content) + "\n")

    def call(held, *arguments):
        call.grids = []

        def grid(words):
            call.grids.append(words)
            given = dict(w.split("=", 1) for w in words[1:])
            for rate, seed in itertools.product(given["optimizer.lr"].split(","), given["seed"].split(",")):
                fine, coarse = held[given["optimizer"], float(rate)]
                write(words, given["optimizer"], rate, seed, {"fine": (fine, 60.0), "coarse": (coarse, 45.0)})
                for task in ("fine", "coarse") if "study.baselines=auto" in words else ():
                    write(words, given["optimizer"], rate, seed, {task: (50.0, 50.0)}, task)
            return 0

        monkeypatch.setattr(tuned_rates, "grid", grid)
        return tuned_rates.main([*arguments, *SMALL, f"output_root={root}", "data.val_fraction=0.25"])

    return call


def test_the_rate_is_chosen_by_delta_m_for_each_optimizer(written, tmp_path, capsys):
    """The first task alone prefers rate 0.02 with sgd too."""
    held = {("sgd", 0.02): (52.0, 40.0), ("sgd", 0.01): (51.0, 60.0), ("adam", 0.01): (50.0, 56.0),
            ("adam", 0.02): (55.0, 55.0)}  # fmt: skip
    file = tmp_path / "alone.csv"
    file.write_text("metric,value\nfine_accuracy,50\ncoarse_accuracy,50\n")
    rates = ("--rates", "0.01,0.02", "--seeds", "1", "--by", "delta_m")
    assert written(held, "equal", "optimizer=sgd,adam", *rates, "--baseline", str(file)) == 0
    assert [(w[1], *w[-2:]) for w in written.grids[2:]] == [
        ("optimizer=sgd", "optimizer.lr=0.01", "seed=1"), ("optimizer=adam", "optimizer.lr=0.02", "seed=1")
    ]  # fmt: skip
    out = capsys.readouterr().out
    found = [re.split(r"\s{2,}", line) for line in out.splitlines() if re.match("equal, .*  ", line)]
    # Validation: (2 + 20) / 2 and 10. Test: (20 - 10) / 2.
    assert [x[0] for x in found] == ["equal, sgd", "equal, adam"]
    assert [x[1:6] for x in found] == [["0.01", "0", "11", "1", "5.0000"], ["0.02", "0", "10", "1", "5.0000"]]
    assert "against the constants of" in out and "over the main metric of each task" in out


def test_single_task_runs_come_with_the_grids(written, capsys):
    held = {("sgd", 0.1): (55.0, 55.0), ("sgd", 0.2): (60.0, 45.0)}
    words = ("equal", "optimizer=sgd", "--rates", "0.1,0.2", "--seeds", "1", "--by", "delta_m")
    assert written(held, *words) == 0
    assert all("study.baselines=auto" in grid for grid in written.grids)
    assert [grid[-2] for grid in written.grids] == ["optimizer.lr=0.1,0.2", "optimizer.lr=0.1"]  # 10 against 5
    assert "against own single-task runs that all strategies share" in " ".join(capsys.readouterr().out.split())
    assert written(held, *words, "study.baselines=none", "--baseline", "cityscapes_libmtl") == 2
    assert "these are numbers of data=cityscapes" in capsys.readouterr().err and not written.grids


def test_validation_data_that_are_there_are_kept(monkeypatch, tmp_path):
    """Elich et al. hold a fifth out, and a table may have its own. Where nobody has any, it is a tenth."""
    grids: list = []
    monkeypatch.setattr(tuned_rates, "grid", lambda words: grids.append(words) or 130)
    (tmp_path / "t.csv").write_text("x,y,part\n1,0,train\n2,1,train\n3,0,val\n4,1,test\n")
    table = (f"data.file={tmp_path / 't.csv'}", "data.labels={y: class}", "data.split=part", "arch=mlp")
    for words in (["experiment=nyuv2_paradigms", "data.root=nowhere"], ["data=table", *table], ["data=digits"]):
        assert tuned_rates.main(["equal", *words, "--rates", "0.1"]) == 130
    assert ["data.val_fraction=0.1" in grid for grid in grids] == [False, False, True]


def test_the_protocol_tries_methods_of_ones_own_config_folder(train, tmp_path, capfd):
    folder = tmp_path / "my_configs"
    (folder / "loss").mkdir(parents=True)
    (folder / "loss" / "strangers.yaml").write_text("_target_: mtl.losses.DWA\ntemperature: 1.0\n")
    assert train("strangers", "--config-dir", str(folder), "--rates", "0.1", "--seeds", "1") == 0
    assert all(f"hydra.searchpath=[{folder}]" in arguments for arguments in train.grids) and len(train.grids) == 2
    out = capfd.readouterr().out
    assert re.search(rf"^python train.py -m .*searchpath=\[{folder}\].* loss=strangers ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["equl"], "did you mean equal?"), (["equal", "loss=dwa"], "loss: the protocol sets it"),
     (["equal", "data=digits", "data.val_fraction=0"], "chosen on validation data"), (["dwa:temp=1"], "unknown key"),
     (["equal", "--seeds", "0,1"], "fresh ones"), (["equal", "trainer.epoch=1"], "did you mean epochs?"),
     (["equal", "--config-dir", "nope"], "nope: is not a folder"),
     (["equal", "--by", "delta"], "--by delta: one of metric, delta_m; did you mean delta_m?"),
     (["equal", "--baseline", "best-overall"], "add --by delta_m"),
     (["equal", "--delta-m", "flt"], "did you mean flat?"),
     (["equal", "optimizer=adam,sgd", "optimizer=adam"], "given twice, optimizer=adam,sgd and optimizer=adam"),
     (["equal", "--by", "delta_m", "--baseline", "bst"], "--baseline bst: one of own, best"),
     (["equal", "--by", "delta_m", "--baseline", "own"], "worst single-task runs would win")],
)  # fmt: skip
def test_the_protocol_refuses_before_it_runs(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(tuned_rates, "grid", pytest.fail)
    assert tuned_rates.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_optuna_proposes_again_what_is_finished(cli, tmp_path):
    """The objective reaches Optuna; the same command reads its finished trials and goes on."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    options = ["-m", "hydra/sweeper=tpe", *SMALL, "loss=static", "data.val_fraction=0.25",
               f"output_root={tmp_path / 'out'}", "++loss.weights.coarse=tag(log, interval(0.03, 3))"]  # fmt: skip
    first = cli(*options, "hydra.sweeper.n_trials=1")
    assert first.code == 0, first.err
    (directory,) = {f.parent for f in (tmp_path / "out").rglob("summary.json")}
    result = yaml.safe_load(next((tmp_path / "out").rglob("optimization_results.yaml")).read_text())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert result["best_value"] == max(row["val/fine_accuracy"] for row in rows)
    assert set(result["best_params"]) == {"optimizer.lr", "++loss.weights.coarse"}
    second = cli(*options, "hydra.sweeper.n_trials=2")
    assert second.code == 0 and second.out.count("(delete that folder to run it again)") == 1
    assert "best validation value: " in second.out
