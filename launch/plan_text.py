"""The training half of `wavefleet plan` as text: the values that `--json` prints, in lines of a terminal's width."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final

LABEL: Final = 15  # columns of what a line is about
_MOST_COLUMNS: Final = 120


def columns() -> int:
    """Of the terminal, as far as lines may be read."""
    return min(shutil.get_terminal_size((_MOST_COLUMNS, 24)).columns, _MOST_COLUMNS)


def training_lines(found: Mapping[str, Any], width: int) -> Iterator[str]:
    """Lines of at most `width` columns.

    Args:
        found: of `plan --json`: its `training` and `cost`.
        width: columns of the terminal.
    """
    for name, text in facts(found):
        yield from _wrapped(name, text, width)
    yield ""
    yield from rank_table(found, width)
    for warning in found["training"]["warnings"]:
        yield ""
        yield from _wrapped("warning", warning["text"], width)


def facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is planned, name and sentence; the page shows them too."""
    training = found["training"]
    epoch, chosen = training["epoch"], training["chosen"]
    shortest, mean, longest = training["utterance_s"]
    yield (
        "speech",
        f"{epoch['num_utterances']:,} utterances, {hours(epoch['audio_s'])}; "
        f"{shortest:.1f} to {longest:.1f} s, mean {mean:.1f} s",
    )
    yield "epoch", f"{count(epoch['num_steps'], 'step')} of {training['units_per_step']} units, {_shapes(epoch)}"
    yield "training", f"{count(training['max_steps'], 'step')}, {training['num_epochs']:.4g} epochs"
    yield "units", _units(training)
    yield "processes", f"{training['world_size']} ({training['strategy']}), {training['precision']}{_shares(chosen)}"
    yield "memory", _memory(training)
    if training["pace"] is not None:
        yield "pace", training["pace"]["source"]
    yield "time", _time(found)
    if "slices" in found["cost"]:
        yield "jobs", _jobs(found)
    yield "checkpoints", _checkpoints(training["checkpoints"])
    if training["num_evaluations"]:
        yield "evaluations", f"{training['num_evaluations']:,}, of {hours(training['eval_audio_s'])} each"
    for note in training["notes"]:
        yield "note", note


def rank_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of ranks; rows of more ranks than units are left out."""
    training = found["training"]
    each = found["cost"]["kind"]
    timed = training["pace"] is not None
    header = ["processes", "useful", "padding", "waiting", *(["a step", "in all", each] if timed else [])]
    rows = []
    for ranks in training["ranks"]:
        if (balance := ranks["balance"]) is not None:
            cells = [f"{100 * balance[f'{name}_share']:.1f} %" for name in ("useful", "padding", "waiting")]
            if timed:
                total_h = ranks["world_size"] * ranks["total_s"] / 3600
                cells += [seconds(ranks["step_s"]), duration(ranks["total_s"]), number(total_h)]
            rows.append([f"{ranks['world_size']:,}", *cells])
    return header, rows


def rank_note(training: Mapping[str, Any]) -> str:
    """What the table of ranks was counted on, and what it leaves out."""
    steps, all_steps = training["num_replayed"], training["epoch"]["num_steps"]
    counted = "all steps of an epoch" if steps == all_steps else f"{steps} of an epoch's {all_steps:,} steps"
    idle = [ranks["world_size"] for ranks in training["ranks"] if ranks["balance"] is None]
    sizes = f"{idle[0]:,}" if len(idle) == 1 else f"{idle[0]:,} to {idle[-1]:,}" if idle else ""
    none = f"; {sizes} processes are more than units_per_step={training['units_per_step']:,}" if idle else ""
    return f"shares of the processes' computing time, counted on {counted}{none}"


def rank_table(found: Mapping[str, Any], width: int) -> Iterator[str]:
    """The table of ranks, for the numbers up to as many as a step has units."""
    header, rows = rank_rows(found)
    sizes = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        mark = "*" if row[0] == f"{found['training']['world_size']:,}" else " "
        yield f"{mark} " + "  ".join(f"{cell:>{size}}" for cell, size in zip(row, sizes, strict=True))
    yield from textwrap.wrap(rank_note(found["training"]), width, initial_indent="  ", subsequent_indent="  ")


def duration(total_s: float) -> str:
    """`4.2 s`, `3 min 20 s`, `5 h 12 min`, `3 d 4 h`."""
    if total_s < 60:
        return seconds(total_s) if total_s < 10 else f"{total_s:.0f} s"
    minutes, rest = divmod(round(total_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    whole, minutes = divmod(minutes, 60)
    return f"{whole} h {minutes:02d} min" if whole < 72 else f"{whole // 24:,} d {whole % 24} h"


def seconds(value: float) -> str:
    """Of a step: three digits."""
    return f"{value:.3g} s" if value >= 0.001 else "under 1 ms"


def number(hours: float) -> str:
    """Of hours that are paid for."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}" if hours >= 0.01 else "under 0.01"


def hours(audio_s: float) -> str:
    """Of audio; of little, minutes."""
    return f"{audio_s / 3600:,.1f} hours" if audio_s >= 3600 else f"{audio_s / 60:,.1f} minutes"


def size(num_bytes: float) -> str:
    """`1.13 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def count(number: int, one: str, several: str | None = None) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _shapes(epoch: Mapping[str, Any]) -> str:
    return f"{count(epoch['num_units'], 'unit')} in {count(epoch['num_shapes'], 'shape')}"


def _units(training: Mapping[str, Any]) -> str:
    epoch = training["epoch"]
    mean_s = epoch["padded_audio_s"] / epoch["num_units"]
    source = "" if training["unit_source"] == "recipe" else f" (unit_audio_s: auto, {training['unit_source']})"
    return (
        f"{mean_s:.3g} s of audio on average{source}, {epoch['max_unit_audio_s']:.3g} s at most; a step "
        f"{training['step_audio_s']:,.4g} s; padding {100 * epoch['padded_share']:.2f} %"
    )


def _shares(chosen: Mapping[str, Any]) -> str:
    balance = chosen["balance"]
    if balance is None:
        return ": more than units of a step"
    shares = (f"{100 * balance[f'{name}_share']:.1f} % {name}" for name in ("useful", "padding", "waiting"))
    return f": of their computing time {', '.join(shares)}"


def _memory(training: Mapping[str, Any]) -> str:
    if not training["memory"]:
        return f"not known: {training['model_problem']}"
    unit, other = training["memory"]
    has = "" if training["gpu"] is None else f" of {training['gpu']}'s {size(training['gpu_bytes'])}"
    parts = ", ".join(
        f"{name} {size(unit['parts'][name])}"
        for name in ("parameters", "gradients", "optimizer", "saved", "recomputed", "working")
        if unit["parts"][name]
    )
    how = ("with", "without") if unit["gradient_checkpointing"] else ("without", "with")
    return (
        f"{size(unit['total_bytes'])}{has} a process, {how[0]} gradient checkpointing, for the largest unit, "
        f"{count(unit['num_utterances'], 'utterance')} of {unit['padded_s']:.2f} s: {parts}; {how[1]} it "
        f"{size(other['total_bytes'])}"
    )


def _time(found: Mapping[str, Any]) -> str:
    training = found["training"]
    chosen, cost = training["chosen"], found["cost"]
    if chosen["total_s"] is None:
        if training["model_problem"]:
            return f"not known: {training['model_problem']}"
        if chosen["balance"] is None:
            return "not known for more processes than units of a step"
        return "not known: name a GPU with --gpu, or a pace with --like RUN or --measure"
    nodes = "" if cost.get("node_hours") is None else f", {number(cost['node_hours'])} node-hours"
    return (
        f"{seconds(chosen['step_s'])} a step, {duration(chosen['total_s'])} in all; "
        f"{number(cost['hours'])} {cost['kind']}{nodes}{', starts of jobs among them' if cost.get('slices') else ''}"
    )


def _jobs(found: Mapping[str, Any]) -> str:
    cost = found["cost"]
    if cost["slices"] is None:
        return "not known" if cost["total_s"] is None else "none would come to train: see the warning"
    after = "" if cost["slices"] == 1 else ", one after the other"
    return (
        f"{count(cost['slices'], 'job')} of {found['time_min']} minutes{after}, less {found['signal_lead_s']} s of "
        f"signal lead and {cost['start_s']:.0f} s to start"
    )


def _checkpoints(found: Mapping[str, Any]) -> str:
    best = f", and {count(found['num_best'], 'evaluation')} that may be the best" if found["num_best"] else ""
    each = "" if found["each_bytes"] is None else f"{size(found['each_bytes'])} each; "
    in_all = "" if found["most_bytes"] is None else f", {size(found['most_bytes'])}"
    return (
        f"{each}{count(found['num_saves'], 'save')}{best}; at most {found['most_kept']} kept and one being "
        f"written{in_all}"
    )


def _wrapped(name: str, text: str, width: int) -> Iterator[str]:
    yield from textwrap.wrap(
        f"{name:<{LABEL}}{text}", width, subsequent_indent=LABEL * " ", break_long_words=False, break_on_hyphens=False
    )
