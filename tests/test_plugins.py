"""The pytest plugins of `make test`: a check that nobody ran must not look like one that passed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE = """
import pytest

def test_runs():
    pass

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no GPU")
def test_on_a_gpu():
    pass
"""
SKIPPED_TEST = MODULE + "\ndef test_needs_something():\n    pytest.skip('not installed')\n"
SKIPPED_MODULE = MODULE + "\npytest.importorskip('no_such_library')\n"


def run(folder, text):
    (folder / "test_it.py").write_text(text)
    (folder / "test_more.py").write_text("def test_more():\n    pass\n")
    plugins = ["-p", "tests.plugin_minutes", "-p", "tests.plugin_skips", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    return subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_gpu_test_may_be_skipped(tmp_path):
    done = run(tmp_path, MODULE)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 1 skipped" in done.stdout
    assert "minutes per test module" in done.stdout


@pytest.mark.parametrize(("text", "name"), [(SKIPPED_TEST, "test_needs_something"), (SKIPPED_MODULE, "test_it.py")])
def test_anything_else_that_is_skipped_fails_the_run_and_is_named(tmp_path, text, name):
    done = run(tmp_path, text)
    assert done.returncode == 1, done.stdout
    assert name in done.stdout.partition("skipped, and should have run")[2]
