"""`wavefleet watch [RUN ...]`: trainings as they go on, here or on a cluster, from their files alone.

On a terminal a picture that renews itself; elsewhere a line for each run whenever it has changed.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asr_train.errors import EXIT_DONE
from asr_train.run_dir import RunDir
from launch.runs import open_run
from launch.status import OVER, describe, readable

_NUM_PARTS = 4  # of the ledger, that a line has room for
_BAR_WIDTH = 24


def main(argv: Sequence[str]) -> int:
    """Show runs until they are over, or until Ctrl-C; a folder is watched until Ctrl-C."""
    options = _parser().parse_args(argv)
    named = [open_run(name) for name in options.runs]
    console = Console()

    def look() -> list[dict[str, Any]]:
        runs = named or [RunDir(path.parent) for path in sorted(Path(options.folder).glob("*/run.json"))]
        return [describe(run, ask_slurm=False) for run in runs]

    def is_over(found: Sequence[Mapping[str, Any]]) -> bool:
        return options.once or (bool(named) and all(row["state"] in OVER for row in found))

    try:
        if console.is_terminal:
            _live(console, look, is_over, options.interval)
        else:
            _plain(look, is_over, options.interval)
    except KeyboardInterrupt:
        pass
    return EXIT_DONE


def _live(console: Console, look: Any, is_over: Any, interval_s: float) -> None:
    """One picture that renews itself."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = look()
            live.update(screen(found), refresh=True)
            if is_over(found):
                return
            time.sleep(interval_s)


def _plain(look: Any, is_over: Any, interval_s: float) -> None:
    """A line for each run that has changed since it was last printed."""
    shown: dict[str, str] = {}
    while True:
        found = look()
        for row in found:
            line = plain(row)
            if shown.get(row["name"]) != line:
                print(line, flush=True)
                shown[row["name"]] = line
        if is_over(found):
            return
        time.sleep(interval_s)


def screen(found: Sequence[Mapping[str, Any]]) -> Group:
    """All runs, three lines each, which fit into 80 columns; those that go on come first, for a screen has an end."""
    lines: list[RenderableType] = []
    for row in sorted(found, key=lambda row: row["state"] in OVER):
        cells = readable(row, _NUM_PARTS)
        left = f"{cells['left']} left" if cells["left"] else ""
        head = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=row["max_steps"] or 1, completed=row["step"], width=_BAR_WIDTH)
        head.add_row(Text(cells["name"], style="bold"), cells["state"], bar, cells["step"], left)
        lines += [head, *(Text(f"  {line}") for line in (_line(cells, _FIGURES), cells["ledger"]) if line)]
    return Group(*lines)


def plain(row: Mapping[str, Any]) -> str:
    """One run as a line; what is not known yet is left out."""
    cells = readable(row, _NUM_PARTS)
    return "  ".join(filter(None, (cells["name"], cells["state"], _line(cells, _WORDS))))


_FIGURES = {"loss": "loss", "wer": "WER", "audio_s_per_s": "audio-s/s", "memory": "memory"}
_WORDS = {"step": "step", **_FIGURES, "left": "left", "ledger": "time:"}


def _line(cells: Mapping[str, str], words: Mapping[str, str]) -> str:
    return "  ".join(f"{word} {cells[key]}" for key, word in words.items() if cells[key])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet watch", description="Trainings as they go on, from their files.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories, or names in runs/; all by default")
    parser.add_argument("--folder", default="runs", help="the folder that all runs are in (%(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (%(default)s)")
    parser.add_argument("--once", action="store_true", help="look once")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
