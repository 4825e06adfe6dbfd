"""pytest plugin: the minutes that each test module took, slowest first. `pytest -p tests.plugin_minutes`."""

from collections import defaultdict

_SECONDS = defaultdict(float)


def pytest_runtest_logreport(report):
    _SECONDS[report.nodeid.partition("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("minutes per test module")
    for module, seconds in sorted(_SECONDS.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{seconds / 60:6.2f}  {module}")
    terminalreporter.write_line(f"{sum(_SECONDS.values()) / 60:6.2f}  in all")
