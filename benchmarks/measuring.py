"""What the benchmarks share: the machine, versions, memory, medians, tables."""

import argparse
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table


def count(text: str) -> int:
    """A command line's whole number, at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def hardware() -> dict[str, Any]:
    """The machine, as far as it matters here, and how busy it is now."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
    }


def versions(*libraries: str) -> dict[str, str]:
    """Versions of what was measured."""
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def apart(function: Callable[[], Any]) -> Any:
    """Call a function in a process of its own, a copy of this one, which has imported everything and used no GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function).result()


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles, and all values in the order they were measured."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]], "runs": values}


def shown(found: dict[str, Any], form: str) -> str:
    """A spread in a table: `median (quartile-quartile)`."""
    low, high = found["quartiles"]
    return f"{found['median']:{form}} ({low:{form}}-{high:{form}})"


def reset_peak_memory() -> None:
    """Start the process's peak anew at what is resident now, where the system can (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_bytes() -> dict[str, int]:
    """Resident memory: the peak, what there is now, and of that the process's own and mapped pages of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    kilobytes = {line.partition(":")[0]: line.split()[1] for line in status.splitlines() if line.endswith(" kB")}
    names = {"peak": "VmHWM", "now": "VmRSS", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(kilobytes[key]) * 1024 for name, key in names.items()}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """The lines of a table; all columns but the first so many are numbers."""
    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < num_left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=400, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.strip() for line in capture.get().splitlines() if line.strip()]


def shown_bars(bars: Sequence[dict[str, Any]]) -> list[str]:
    """What was expected, and whether it was found, a line each."""
    lines = []
    for bar in bars:
        wanted = f"at least {bar['at_least']}" if "at_least" in bar else f"at most {bar['at_most']}"
        lines.append(f"- {bar['bar']}: {bar['found']:.2f}; expected {wanted}: {'met' if bar['met'] else 'NOT met'}")
    return lines
