"""Benchmarks in tests: started as scripts, loaded as modules, their committed results compared with today's form."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def load(name):
    """A benchmark's module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(BENCHMARKS))  # as when it is run as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def check_committed(name, smoke_result):
    """The result in the repository has the form of today's, and the README has its table."""
    committed = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert keys(committed) == keys(smoke_result)
    module = load(name)
    assert module.render(committed) in (BENCHMARKS / "README.md").read_text(encoding="utf-8")


def keys(value):
    """The structure of a result: nested keys, without the values."""
    return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None
