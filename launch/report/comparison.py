"""The page that compares runs: scores, curves over each other, what differs in their recipes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.report.charts import Table
from launch.report.curves import overlaid
from launch.report.lives import read_lives, run_ledger
from launch.report.page import duration, percent, render
from launch.report.reading import Record
from launch.report.rows import Rows, difference, half_width
from launch.report.run_page import newest_rows, shown, with_width

_PLACES = ("name", "run_dir", "data.corpus_root")
_MISSING = "(not there)"


def comparison_page(records: Sequence[Record]) -> str:
    """The comparison, as HTML."""
    named = _named(records)
    content = {
        "title": " and ".join(named) if len(named) == 2 else f"{len(named)} runs",
        "made": time.time(),
        "notices": _notices(named),
        "sections": [("scores", "Scores"), ("curves", "Curves"), ("recipe", "Recipes"), ("runs", "Runs")],
        "records": named,
        "scores": _scores(named),
        "charts": overlaid(named),
        "differing": differing(named),
        "runs": _runs(named),
    }
    return render("comparison.html.j2", content)


def differing(records: Mapping[str, Record]) -> Table:
    """Fields of the recipes that are not the same in all runs; names and places of a run are no difference."""
    fields = [record.fields for record in records.values()]
    keys = dict.fromkeys(key for values in fields for key in values if key not in _PLACES)
    cells = []
    for key in keys:
        texts = [shown(values[key]) if key in values else _MISSING for values in fields]
        if len(set(texts)) > 1:
            cells.append([key, *texts])
    return Table(("field", *records), cells)


def _named(records: Sequence[Record]) -> dict[str, Record]:
    """Runs by the name of their directory, or by their whole path where names are the same."""
    names = [record.name for record in records]
    return {record.name if names.count(record.name) == 1 else str(record.run.path): record for record in records}


def _notices(records: Mapping[str, Record]) -> list[str]:
    corpora = {record.latest("corpus_hash") for record in records.values()} - {None}
    notices = []
    if len(corpora) > 1:
        notices.append("These runs were trained on different corpora; sets of one name may hold different utterances.")
    torn = [name for name, record in records.items() if record.num_torn]
    if torn:
        notices.append(f"Lines of metrics.jsonl cannot be read and are left out: {', '.join(torn)}.")
    return notices


def _scores(records: Mapping[str, Record]) -> Table:
    """A row for each set and run; the difference is to the first run that was scored on the set."""
    rows = {name: {entry.set_name: entry for entry in newest_rows(record, 0)} for name, record in records.items()}
    cells = []
    for set_name in dict.fromkeys(name for record in records.values() for name in record.set_names):
        first: Rows | None = None
        for name, record in records.items():
            lines = [line for line in record.evaluations if line["set"] == set_name]
            if not lines:
                continue
            last, best = lines[-1], min(lines, key=lambda line: line["wer"])
            mine = rows[name].get(set_name)
            mine = mine if mine is not None and mine.step == last["step"] else None
            cells.append([
                set_name, name, last["step"],
                with_width(last["wer"], half_width(mine.errors.values()) if mine else None),
                _difference(first, mine), percent(last.get("cer")), last.get("num_rows"), last.get("num_refused"),
                percent(best["wer"]), best["step"],
            ])  # fmt: skip
            first = first or mine
    header = (
        "set", "run", "step", "WER", "difference", "CER", "rows", "refused", "lowest WER", "at step"
    )  # fmt: skip
    return Table(header, cells)


def _difference(first: Rows | None, mine: Rows | None) -> str | None:
    found = difference(first.errors, mine.errors) if first is not None and mine is not None else None
    return None if found is None else f"{100 * found[0]:+.2f} ± {100 * found[1]:.2f}"


def _runs(records: Mapping[str, Record]) -> Table:
    cells: list[list[Any]] = []
    for name, record in records.items():
        lives = read_lives(record.run, record.lines)
        ledger = run_ledger(lives)
        step = record.training[-1]["step"] if record.training else 0
        cells.append([
            name, "done" if record.done else lives[-1].ending.replace("_", " ") if lives else "new", step,
            record.latest("max_steps"), duration(ledger.wall_s), percent(ledger.shares.get("compute"), 1),
            sum(life.attempt is not None for life in lives), sum(life.num_lost_steps for life in lives),
            record.latest("world_size"), record.latest("strategy"), record.latest("device"),
            (record.latest("versions") or {}).get("wavefleet"), str(record.run.path),
        ])  # fmt: skip
    header = (
        "run", "state", "steps", "of", "wall time", "useful", "attempts", "steps lost", "ranks", "strategy", "device",
        "wavefleet", "path",
    )  # fmt: skip
    return Table(header, cells)
