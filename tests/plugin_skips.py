"""pytest plugin: a skipped test fails the run, unless it needs a GPU. `pytest -p tests.plugin_skips`.

A check that nobody ran must not look like one that passed.
"""

import pytest

_UNWANTED = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    if outcome.get_result().skipped and item.get_closest_marker("gpu") is None:
        _UNWANTED.append(item.nodeid)


def pytest_collectreport(report):
    if report.skipped:
        _UNWANTED.append(report.nodeid)


def pytest_sessionfinish(session):
    if _UNWANTED and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _UNWANTED:
        terminalreporter.section("skipped, and should have run")
        for name in _UNWANTED:
            terminalreporter.write_line(name, red=True)
