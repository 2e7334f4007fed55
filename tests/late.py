"""The summary lists tests that take long and are not marked slow: hooks of pytest, which ``conftest.py`` imports."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

FAST_S = 3.0
"""CPU seconds that a test may take without being marked ``slow``."""
_CPU_S = "cpu_s"
STARTED = pytest.StashKey[float]()
"""Of a test: :func:`cpu_s` before its fixtures are made."""


def cpu_s() -> float:
    """CPU seconds of this process and of those that it waited for: unlike the time, the same on a busy machine."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[STARTED] = cpu_s()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The last report of a test carries its CPU seconds, fixtures included, to the process that prints the summary."""
    report = yield
    if report.when == "teardown" and item.get_closest_marker("slow") is None:
        report.user_properties.append((_CPU_S, cpu_s() - item.stash[STARTED]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "when")]
    taken = [(value, r.nodeid) for r in reports for name, value in getattr(r, "user_properties", ()) if name == _CPU_S]
    late = sorted((seconds, test) for seconds, test in set(taken) if seconds > FAST_S)
    if late:
        terminalreporter.section(f"above {FAST_S:g} s of CPU time, but not marked slow")
        for seconds, test in reversed(late):
            terminalreporter.line(f"{seconds:6.1f} s  {test}")
