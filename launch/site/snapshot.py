"""The code that a job runs: a copy in the run directory, uncommitted changes in it, so that editing changes no job."""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import asr_train
import launch
from asr_train.errors import RunError
from asr_train.files import fsync_dir

_PACKAGES = ("asr_train", "launch")
_SHIPPED = ("accelerate_configs", "recipes", "slurm")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def take(folder: Path) -> Path:
    """Copy this program into `folder/<hash>`, unless that very code is there already; its path.

    Raises:
        RunError: the copy could not be made.
    """
    sources, root = _sources()
    final = where(folder)
    if final.exists():
        return final
    aside = folder / f".{final.name}.{uuid.uuid4().hex[:8]}"
    try:
        for source in sorted(sources):
            target = aside / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=_LEFT_OUT)
            else:
                shutil.copy2(source, target)
        os.rename(aside, final)
        fsync_dir(folder)
    except OSError as error:
        raise RunError(f"the code could not be copied to {final}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def where(folder: Path) -> Path:
    """Where `take` would copy this program to, or has."""
    return folder / _hash(*_sources())


def check_running(code: Path) -> None:
    """Make sure that this process runs a snapshot's code and no other.

    Raises:
        RunError: it runs something else; says what.
    """
    for name, module in (("asr_train", asr_train), ("launch", launch)):
        found = Path(module.__file__ or "").resolve()
        if not found.is_relative_to(code.resolve()):
            raise RunError(f"{name} comes from {found}, and should come from the run's own copy in {code}")


def running_hash() -> str:
    """Hash of the code that this process runs, as it lies on disk here."""
    return _hash(*_sources())


def _sources() -> tuple[set[Path], Path]:
    """Files and folders that make the program, and what their names are relative to."""
    root = Path(asr_train.__file__).parent.parent
    sources = {Path(module.__file__ or "").parent for module in (asr_train, launch)}
    sources |= {root / name for name in _SHIPPED if (root / name).is_dir()}
    if (root / "pyproject.toml").exists():  # marks a checkout, whose recipes are beside the packages
        sources.add(root / "pyproject.toml")
    return sources, root


def _hash(sources: set[Path], root: Path) -> str:
    """Of every file's name and content."""
    found = hashlib.sha256()
    for source in sorted(sources):
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                found.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
                found.update(path.read_bytes())
    return found.hexdigest()[:12]
