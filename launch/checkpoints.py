"""`wavefleet checkpoints RUN`: which there are, whether they are whole, which one a training would go on from."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from asr_train import checkpoints
from asr_train.checkpoints import Checkpoint
from asr_train.errors import EXIT_DONE, EXIT_NO_CHECKPOINT, RunError
from asr_train.run_dir import RunDir, read_metrics
from launch.runs import open_run


def main(argv: Sequence[str]) -> int:
    """List a run's checkpoints; returns 0, or 5 when there are checkpoints and none can be used."""
    options = _parser().parse_args(argv)
    run = open_run(options.run)
    recipe = run.recipe()
    if not run.checkpoints.is_dir():
        raise RunError(f"{run.path} has no checkpoint yet; train it first")
    found = checkpoints.found(run.checkpoints)
    if options.verify:
        console = Console(stderr=True)
        found = [
            checkpoints.verify(checkpoint)
            for checkpoint in track(found, "reading every byte", console=console, disable=not console.is_terminal)
        ]
    resumed = _resumed(found, run.failures(recipe), recipe.checkpoint.max_failed_attempts)
    rows = [_row(checkpoint, _wer(run), checkpoint is resumed, verified=options.verify) for checkpoint in found]
    aside = [
        {"name": path.name, "reason": checkpoints.reason(path)}
        for path in sorted((run.checkpoints / checkpoints.QUARANTINE).glob("*"))
    ]
    if options.json:
        print(json.dumps({"checkpoints": rows, "quarantined": aside}, indent=2, ensure_ascii=False))
    else:
        _print(rows, aside)
    return EXIT_DONE if resumed is not None or not (rows or aside) else EXIT_NO_CHECKPOINT


def _resumed(found: Sequence[Checkpoint], failures: Mapping[int, int], max_failures: int) -> Checkpoint | None:
    """Which one the next attempt goes on from: the newest whole one, or the one before when attempts fail from it."""
    whole = [checkpoint for checkpoint in found if checkpoint.problem is None]
    newest = [checkpoint for checkpoint in whole[-2:] if failures.get(checkpoint.step, 0) < max_failures]
    return newest[-1] if newest else None


def _wer(run: RunDir) -> dict[int, dict[str, float]]:
    """Step -> WER of every set evaluated there."""
    found: dict[int, dict[str, float]] = {}
    for line in read_metrics(run):
        if "set" in line:
            found.setdefault(int(line["step"]), {})[str(line["set"])] = float(line["wer"])
    return found


def _row(
    checkpoint: Checkpoint, wer: Mapping[int, Mapping[str, float]], is_resumed: bool, *, verified: bool
) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "name": checkpoint.name,
        "step": checkpoint.step,
        "written": manifest.get("written"),
        "size_bytes": checkpoint.size_bytes if manifest else None,
        "strategy": manifest.get("strategy"),
        "world_size": manifest.get("world_size"),
        "wer": dict(wer.get(checkpoint.step, {})),
        "whole": checkpoint.problem is None,
        "verified": verified,
        "problem": checkpoint.problem,
        "resumed_next": is_resumed,
    }


def _print(rows: Sequence[Mapping[str, Any]], aside: Sequence[Mapping[str, str]]) -> None:
    table = Table(
        "", "checkpoint", "age", "size", "written by", "WER", "", box=None, pad_edge=False, header_style="dim"
    )
    for row in rows:
        state = row["problem"] or ("whole, every byte" if row["verified"] else "whole")
        scores = ", ".join(f"{name} {100 * value:.2f} %" for name, value in row["wer"].items())
        by = f"{row['strategy']} on {row['world_size']}" if row["strategy"] else "?"
        table.add_row(
            "->" if row["resumed_next"] else "", row["name"], _age(row["written"]), _size(row["size_bytes"]), by,
            scores or "-", state, style=None if row["whole"] else "red",
        )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 200, soft_wrap=True)
    console.print(table if rows else "no checkpoint")
    if any(row["resumed_next"] for row in rows):
        print("-> the next attempt goes on from this one")
    elif rows:
        print("none of them can be used; a training will not start from nothing while this folder is here")
    for entry in aside:
        print(f"set aside in {checkpoints.QUARANTINE}/: {entry['name']}: {entry['reason']}")


def _age(written: float | None) -> str:
    """How long ago, in its two largest units."""
    if written is None:
        return "?"
    seconds = max(0, round(time.time() - written))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "?"
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= bytes_each:
            return f"{size_bytes / bytes_each:.1f} {unit}"
    return f"{size_bytes} B"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet checkpoints", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with what was written")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
