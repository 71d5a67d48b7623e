"""A plugin of pytest (`-p gpu_day_tests`): each test's outcome as soon as it is known, as a line of $GPU_DAY_TESTS.

pytest itself says which tests failed, and why, only at its end. A process killed before then would say nothing.
"""

import json
import os


def pytest_runtest_logreport(report) -> None:
    """One line per test, and one per error in setting it up or taking it down."""
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
