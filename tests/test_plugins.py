"""How `make test` runs tests: what nobody ran, or what failed in one half, must not look like what passed."""

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
WITH_SLURM = MODULE + "\n@pytest.mark.slurm\ndef test_a_cluster():\n    pass\n"


def run(folder, text, *program):
    (folder / "test_it.py").write_text(text)
    (folder / "test_more.py").write_text("def test_more():\n    pass\n")
    plugins = ["-p", "tests.plugin_minutes", "-p", "tests.plugin_skips"]
    pytest_here = ["pytest", *plugins, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    command = [*program, sys.executable, "-m", *pytest_here, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


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


def test_the_halves_run_each_test_once_and_are_printed_one_after_the_other(tmp_path):
    done = run(tmp_path, WITH_SLURM, ".ci/test-in-halves")
    assert done.returncode == 0, done.stdout
    others, slurm = done.stdout.split("\nTests with Slurm.\n")
    assert "2 passed, 1 skipped, 1 deselected" in others
    assert "1 passed, 3 deselected" in slurm
    assert "minutes per test module" in others
    assert "minutes per test module" in slurm
    ends = slurm.splitlines()[-2:]
    assert ends[0].startswith("without Slurm, exit code 0: ") and "2 passed" in ends[0]
    assert ends[1].startswith("with Slurm, exit code 0: ") and "1 passed" in ends[1]


@pytest.mark.parametrize(
    ("text", "without", "with_slurm"),
    [
        (WITH_SLURM + "    assert False\n", 0, 1),
        (WITH_SLURM + "    pytest.skip('not installed')\n", 0, 1),
        (WITH_SLURM + "def test_fails():\n    assert False\n", 1, 0),
        (MODULE, 0, 5),  # no test at all
    ],
)
def test_either_half_that_fails_fails_both(tmp_path, text, without, with_slurm):
    done = run(tmp_path, text, ".ci/test-in-halves")
    assert done.returncode == 1, done.stdout
    ends = done.stdout.splitlines()[-2:]
    assert ends[0].startswith(f"without Slurm, exit code {without}: ")
    assert ends[1].startswith(f"with Slurm, exit code {with_slurm}: ")
