"""What the shared plugin of the tests prints."""

from types import SimpleNamespace

import pytest

from common.testing import pytest_terminal_summary


def test_what_tests_measured_is_printed_once_however_they_ended():
    def report(when, outcome, *properties):
        return pytest.TestReport("a", ("a", 1, "a"), {}, outcome, None, when, user_properties=list(properties))

    line, other = ("measured", "ncl_pp: 20 kills"), ("junit", "x")
    stats = {
        "passed": [report("call", "passed", line, other), report("teardown", "passed", line)],
        "failed": [report("call", "failed", ("measured", "rbonn: 3 lines"))],
        "warnings": [object()],
    }
    lines: list[str] = []
    pytest_terminal_summary(SimpleNamespace(stats=stats, write_line=lines.append))  # type: ignore[arg-type]
    assert lines == ["ncl_pp: 20 kills", "rbonn: 3 lines"]
