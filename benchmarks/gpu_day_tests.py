"""A plugin of pytest (`-p gpu_day_tests`). It appends the outcome of each test to the file $GPU_DAY_TESTS at once.

pytest itself reports the failures at its end only. If it is killed before, nothing would be known.
"""

import json
import os


def pytest_runtest_logreport(report) -> None:
    """Append one line per test, and one per error in its setup or teardown."""
    if report.when != "call" and report.passed:
        return
    reason = ""
    if report.failed:
        reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr)).splitlines()[0]
    elif report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason}
    with open(os.environ["GPU_DAY_TESTS"], "a") as file:
        file.write(json.dumps(line) + "\n")
