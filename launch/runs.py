"""Runs by name, as every verb takes them."""

from pathlib import Path

from asr_train.errors import RunError
from asr_train.run_dir import RunDir


def open_run(name: str) -> RunDir:
    """A run directory by its path, or by its name in runs/.

    Raises:
        RunError: it is neither.
    """
    for path in (Path(name), Path("runs") / name):
        if (path / "run.json").exists():
            return RunDir(path.absolute())
    raise RunError(f"{name} is no run directory, nor the name of one in runs/")
