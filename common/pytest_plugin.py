"""What pytest loads first, see pyproject.toml: `common.testing` with the fixtures, and what the terminal shows at the end."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests out to workers (pytest -n) does without torch: seconds in which nothing else can run."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("common.testing")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests have measured: record_property("measured", "a line"). Workers of xdist have no terminal of their own."""
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    for line in [value for r in reports if r.when == "call" for name, value in r.user_properties if name == "measured"]:
        terminalreporter.write_line(str(line))
