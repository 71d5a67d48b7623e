"""The prepared GPU day: its time, its plan, its page, and runs that stop and go on. What it measures is not tested."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_day
from at_once import choose
from files import read_lines
from gpu_day import Clock, Phase, execute, keep, main, parse, phases, report
from gpu_day_page import plan, render
from gpu_day_runs import Pool, Run
from throughput import Loop, measure, rows


def phase(tmp_path: Path, code: str, share: float = 1.0, grace: float = 1.0) -> Phase:
    result = tmp_path / "logs" / "found.json"
    return Phase("found", share, lambda _: [sys.executable, "-c", code, str(result)], result, grace)


WRITES = "import sys, time; open(sys.argv[1], 'w').write('{\"rows\": 3}'); "


def alive(process: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestTime:
    def test_a_phase_gets_its_share_and_never_more_than_is_left(self):
        now = 100.0
        clock = Clock(60, lambda: now)
        assert clock.budget(0.25) == 15
        assert clock.budget(1.0) == 60 - gpu_day.RESERVE
        now = 150.0
        assert clock.budget(0.25) == 10 - gpu_day.RESERVE
        now = 161.0
        assert clock.budget(1.0) == 0

    def test_what_a_phase_found_before_its_budget_was_over_is_kept(self, tmp_path):
        found = phase(tmp_path, WRITES + "time.sleep(60)", share=0.04)
        clock = Clock(100)
        execute(found, clock, dict(os.environ))
        assert (found.status, found.found) == ("cut", {"rows": 3})
        assert clock.elapsed() < 30

    def test_a_process_that_ignores_the_signal_ends_with_all_that_it_started(self, tmp_path):
        code = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        code += "child = subprocess.Popen(['sleep', '60']); open(sys.argv[1], 'w').write(str(child.pid)); "
        code += "time.sleep(60)"
        found = phase(tmp_path, code, share=0.04)
        execute(found, Clock(100), dict(os.environ))
        assert found.status == "cut"
        deadline = time.monotonic() + 20  # it has its SIGKILL; a busy machine takes a moment to carry that out
        while alive(found.found) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(found.found)

    def test_a_failure_says_why_and_keeps_what_was_found(self, tmp_path):
        found = phase(tmp_path, WRITES + "sys.exit('no such device')")
        execute(found, Clock(100), dict(os.environ))
        assert (found.status, found.error) == ("failed", "exit code 1: no such device")
        assert found.found == {"rows": 3}

    def test_no_phase_starts_when_the_time_is_over(self, tmp_path):
        found = phase(tmp_path, WRITES)
        execute(found, Clock(gpu_day.RESERVE + 1), dict(os.environ))
        assert (found.status, found.error) == ("not reached", "1 s were left")

    def test_what_an_earlier_day_found_is_not_taken_for_this_day(self, tmp_path):
        found = phase(tmp_path, "raise SystemExit(1)")
        found.result.parent.mkdir()
        found.result.write_text("{}")
        execute(found, Clock(100), dict(os.environ))
        assert found.found is None and found.error == "exit code 1: no output"

    def test_a_half_written_line_is_left_out(self, tmp_path):
        file = tmp_path / "tests.jsonl"
        file.write_text('{"test": 1}\n{"te')
        assert read_lines(file) == [{"test": 1}]


@pytest.fixture
def options(tmp_path):
    (tmp_path / "data" / "cifar-100-python").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some-1-py3-none-any.whl").touch()

    def call(*more: str):
        folders = ["--out", str(tmp_path / "day"), "--data", str(tmp_path / "data")]
        return parse(["--minutes", "9", *folders, "--wheels", str(tmp_path / "wheels"), *more])

    return call


class TestPlan:
    def test_the_phases_leave_time_for_the_runs(self, options):
        todo = phases(options())
        assert [p.name for p in todo] == ["install", "tests", "steps resnet20", "steps resnet56", "at-once", "runs"]
        assert sum(p.share for p in todo[:-1]) <= 0.8

    def test_a_given_number_of_runs_is_not_measured(self, options):
        status = {p.name: p.status for p in phases(options("--at-once", "3", "--phases", "at-once", "runs"))}
        assert [n for n, s in status.items() if s == "skipped"] == [
            "tests", "steps resnet20", "steps resnet56", "at-once"
        ]  # fmt: skip

    def test_the_runs_follow_the_protocol(self, options, tmp_path):
        command = phases(options("--seeds", "1", "2", "--override", "trainer.epochs=3"))[-1].command(100)
        assert command[command.index("--seeds") + 1 :][:2] == ["1", "2"]
        words = command[command.index("--") + 1 :]
        assert words[:3] == ["experiment=cifar100", "trainer.precision=bf16", "arch=resnet20"]
        assert f"data.root={tmp_path / 'data'}" in words and words[-1] == "trainer.epochs=3"

    def test_it_starts_nothing(self, options, tmp_path, capsys):
        folders = ["--out", str(tmp_path / "day"), "--data", str(tmp_path / "data")]
        assert main(["--minutes", "9", *folders, "--plan"]) == 0
        said = capsys.readouterr().out
        assert "tests: 162 s at most" in said and "12 runs: dwa, equal, uncertainty, pcgrad; seeds 42, 123, 456" in said
        assert not (tmp_path / "day").exists()

    def test_an_earlier_day_says_how_long_the_rest_takes(self, options):
        before = {"phases": {"runs": {"found": {"runs": [run(30)], "seconds": 60.0}}}}
        assert "170 epochs were left, about 6 minutes" in plan(options(), phases(options()), before)

    @pytest.mark.parametrize("option", ["--data", "--wheels"])
    def test_a_folder_without_what_it_should_hold_is_refused(self, option, tmp_path, capsys):
        with pytest.raises(SystemExit):
            parse(["--minutes", "9", "--out", "day", option, str(tmp_path)])
        assert f"error: {option}: {tmp_path} holds no" in capsys.readouterr().err


def run(reached: int, **more) -> dict:
    last = {"test/fine_accuracy": 40.5, "test/coarse_accuracy": 55.25} if reached else {}
    pace = {"seconds_per_epoch": 4.5, "images_per_second": 12345.0, "peak_memory_gib": None}
    pace = pace if reached else dict.fromkeys(pace)
    return {"loss": "dwa", "seed": 42, "status": "interrupted", "error": None, "epochs": 200, "before": 0,
            "reached": reached, "last": last, "best": last, **pace, **more}  # fmt: skip


def day(**found) -> dict:
    note = {"command": "python it.py", "status": "done", "seconds": 5.0, "budget": 50.0, "error": None}
    about = {"command": "python benchmarks/gpu_day.py", "commit": "abc", "began": "today", "minutes": 9, "seconds": 500}
    device = {"asked": "cuda", "name": "A GPU", "driver": "1.2", "memory": "80 GiB", "cores": 16}
    phases = {name.replace("_", " "): {**note, "found": what} for name, what in found.items()}
    return {**about, "device": device, "versions": {"torch": "2.11"}, "phases": phases}


RATIO = {"median": 2.5, "lowest": 2.25, "highest": 2.75}
ROW = {"loop": "mtl, equal, bf16", "rounds": 3, "images_per_second": 12800.0, "step_ms": 10.0, "x_plain": RATIO,
       "x_in_memory": None, "memory_mib": 321.5}  # fmt: skip
UNTIMED = {"loop": "late", "rounds": 0} | dict.fromkeys(
    ["images_per_second", "step_ms", "x_plain", "x_in_memory", "memory_mib"]
)


class TestPage:
    def test_it_shows_what_each_phase_found(self):
        tests = [{"test": "test_a[x|y]", "outcome": "failed", "seconds": 1.0, "reason": "AssertionError: no"},
                 {"test": "test_b", "outcome": "passed", "seconds": 2.0, "reason": ""}]  # fmt: skip
        runs = {"words": ["arch=resnet20"], "at_once": 2, "seconds": 60.0, "runs": [run(30), run(0, seed=123)]}
        page = render(day(tests=tests, steps_resnet20={"about": "resnet20", "rows": [ROW, UNTIMED]}, runs=runs))
        assert "1 failed, 1 passed, 3 s in tests" in page
        assert "| test_a[x\\|y] | failed | AssertionError: no |" in page
        assert "| mtl, equal, bf16 | 10.0 | 12,800 | 2.50 (2.25–2.75) | – | 322 | 3 |" in page
        assert "| loss | seed | status | epochs | fine last / best | coarse last / best | s an epoch |" in page
        assert "| dwa | 42 | interrupted | 30 (0 before) of 200 | 40.50 / 40.50 | 55.25 / 55.25 | 4.50 |" in page
        assert "| dwa | 123 | interrupted | 0 (0 before) of 200 | – | – | – | – | – |" in page
        assert "30 epochs, 30.0 a minute" in page
        assert "- steps resnet20: no round of “late”\n- tests: 1 failed\n" in page
        assert "- 2 of 2 runs are not finished: 370 epochs are left, about 12 minutes" in page

    def test_every_phase_may_have_failed(self):
        content = day(tests=None, steps_resnet20=None, at_once=None, runs=None)
        for name, status in zip(content["phases"], ["failed", "cut", "not reached", "failed"], strict=True):
            content["phases"][name].update(status=status, error="exit code 1: no GPU" if status == "failed" else None)
        page = render(content)
        assert "- tests: failed: exit code 1: no GPU\n- steps resnet20: cut\n- at once: not reached\n" in page

    def test_a_machine_of_which_nothing_is_known_has_a_page(self):
        content = day()
        content.update(commit=None, device={**dict.fromkeys(content["device"]), "asked": "cpu"}, versions={})
        assert "| commit | unknown |" in render(content) and "Everything fitted." in render(content)

    def test_an_earlier_page_is_kept(self, tmp_path):
        for number in (1, 2, 3):
            keep(tmp_path)
            report(tmp_path, {**day(), "commit": f"c{number}"})
        commits = [json.loads((tmp_path / f"gpu_day{n}.json").read_text())["commit"] for n in ("-1", "-2", "")]
        assert commits == ["c1", "c2", "c3"]


class TestTimes:
    def test_a_measurement_that_is_cut_reports_the_rounds_it_has(self):
        loops = [Loop("plain", lambda: 2.0), Loop("bare", lambda: 0.5, "bare"), Loop("ours", lambda: 1.0, "bare")]
        notes = []
        until = time.monotonic() + 1000
        measure(loops, 2, "cpu", until, lambda: notes.append(rows(loops, images=256, batch=128)))
        after_two, last = notes[1], notes[-1]
        assert [row["rounds"] for row in after_two] == [1, 1, 0]
        assert after_two[2]["x_plain"] is None and after_two[2]["step_ms"] is None
        assert last[2]["x_plain"] == {"median": 2.0, "lowest": 2.0, "highest": 2.0}
        assert last[2]["x_in_memory"]["median"] == 0.5 and last[0]["x_in_memory"] is None
        assert (last[2]["step_ms"], last[2]["images_per_second"]) == (500.0, 256.0)

    def test_no_loop_starts_after_the_time(self):
        loop = Loop("plain", lambda: pytest.fail("started"))
        measure([loop], 2, "cpu", time.monotonic(), lambda: None)
        assert loop.seconds == []

    def test_as_few_runs_at_a_time_as_are_nearly_the_fastest(self):
        assert choose({1: 10.0, 2: 19.0, 4: 20.0, 8: 18.0}) == 2


class TestRuns:
    """`Pool` with processes that only sleep."""

    @pytest.fixture
    def runs(self, tmp_path, monkeypatch):
        script = tmp_path / "train.py"
        script.write_text("import sys, time; time.sleep(float(sys.argv[1])); sys.exit(sys.argv[2])")
        monkeypatch.setattr("gpu_day_runs.ROOT", tmp_path)

        def call(*seconds: float, message: str = "") -> list[Run]:
            words = [[str(s), message] for s in seconds]
            return [Run("equal", k, w, tmp_path / str(k), 2, log=tmp_path / f"{k}.log") for k, w in enumerate(words)]

        return call

    def test_the_next_run_starts_when_one_ends_and_the_rest_is_stopped(self, runs):
        pool = Pool(runs(0, 60, 60, 60), 2, time.time() + 100)
        while len(pool.waiting) > 1:
            assert pool.turn() and len(pool.active) <= 2
            time.sleep(0.05)
        began = time.time()
        pool.close()
        assert time.time() - began < 10 and not pool.active
        assert [r.process for r in pool.runs] == [None] * 4

    def test_no_run_starts_when_little_time_is_left(self, runs):
        pool = Pool(runs(0), 1, time.time() + 20)
        assert not pool.turn() and len(pool.waiting) == 1

    def test_a_failed_run_says_why(self, runs):
        (one,) = runs(0, message="error: no such data")
        pool = Pool([one], 1, time.time() + 100)
        while pool.turn():
            time.sleep(0.05)
        assert one.state()["status"] == "failed"
        assert one.state()["error"] == "exit code 1: error: no such data"

    def test_what_is_finished_is_not_started_and_the_others_go_on(self, runs):
        first, second = runs(60, 60)
        for one, status in ((first, "finished"), (second, "running")):
            one.directory.mkdir()
            (one.directory / "run.json").write_text(json.dumps({"status": status}))
            row = {"epoch": 1, "test/fine_accuracy": 40.0, "test/fine_loss": 2.0, "time/seconds": 2.0}
            text = json.dumps({**row, "time/images_per_second": 10.0})
            (one.directory / "metrics.jsonl").write_text(f"{text}\n" + '{"epo')
        assert Pool([first, second], 2, time.time() + 100).waiting == [second]
        state = second.state()
        assert (state["status"], state["reached"], state["last"]) == ("killed", 1, {"test/fine_accuracy": 40.0})
