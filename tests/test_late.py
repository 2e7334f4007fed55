"""The summary names tests that should be marked slow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from late import FAST_S, STARTED, cpu_s, pytest_terminal_summary


def test_late_tests_are_listed_once_latest_first() -> None:
    def report(name: str, when: str, *seconds: float) -> SimpleNamespace:
        return SimpleNamespace(nodeid=name, when=when, user_properties=[("cpu_s", s) for s in seconds])

    stats = {
        "passed": [report("a", "call"), report("b", "call"), report("c", "call"), report("marked slow", "call")],
        "": [
            report("a", "teardown", FAST_S + 1),
            report("b", "teardown", FAST_S / 2),
            report("marked slow", "teardown"),
        ],
        "error": [report("c", "teardown", FAST_S + 5)],
        "warnings": [SimpleNamespace(message="no report of a test")],
    }
    lines: list[str] = []
    pytest_terminal_summary(SimpleNamespace(stats=stats, section=lines.append, line=lines.append))  # type: ignore[arg-type]
    assert [line.split()[-1] for line in lines[1:]] == ["c", "a"]
    assert lines[0] == "above 3 s of CPU time, but not marked slow"


def test_cpu_time_is_counted_with_that_of_fixtures(request: pytest.FixtureRequest) -> None:
    assert 0 <= cpu_s() - request.node.stash[STARTED] < 60
