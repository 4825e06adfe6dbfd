"""The page of one run: what its files say, sorted into sections."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from asr_train import checkpoints
from asr_train.errors import CorpusError, say
from asr_train.recipe import dump_recipe
from launch.report.bars import balance_chart, clock, ledger_chart, timeline_chart
from launch.report.charts import NOTHING, Table
from launch.report.curves import length_chart, score_charts, training_charts, wer_by_length_chart
from launch.report.lives import Life, read_lives, run_ledger
from launch.report.page import duration, percent, render, size
from launch.report.reading import Record
from launch.report.rows import Rows, half_width, read_rows
from launch.report.speech import Clips, Speech, open_speech

_MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line asks for.

    Attributes:
        num_worst: utterances shown of each set.
        audio_bytes: what their recordings may take in the file; 0 embeds none.
    """

    num_worst: int = 50
    audio_bytes: int = 0


def run_page(record: Record, wishes: Wishes) -> str:
    """The report of one run, as HTML."""
    lives = read_lives(record.run, record.lines)
    speech, no_corpus = open_speech(record)
    evaluations = newest_rows(record, wishes.num_worst)
    clips, audio_note = _clips(speech, no_corpus, evaluations, wishes)
    balanced = next((life for life in reversed(lives) if life.ledger.ranks), None)
    content = {
        "title": record.name,
        "state": _state(record, lives),
        "made": time.time(),
        "notices": _notices(record),
        "facts": _facts(record, lives),
        "training": training_charts(record),
        "scores": score_table(record, evaluations) if record.evaluations else None,
        "score_charts": score_charts(record),
        "wer_by_length": wer_by_length_chart(evaluations),
        "ledger_chart": ledger_chart(lives),
        "timeline": timeline_chart(lives),
        "attempts": _attempts(lives),
        "checkpoints": _checkpoints(record),
        "balance": balanced and balance_chart(balanced),
        "no_balance": "Ledger lines say how each rank spent its time; the lines of this run hold none.",
        "corpus": speech and _corpus_table(speech),
        "rejected": speech and _rejected_table(speech),
        "lengths": speech and length_chart(speech),
        "no_corpus": no_corpus,
        "evaluations": evaluations,
        "clips": clips.found,
        "audio_note": audio_note,
        "confusions": {rows.set_name: _confusions(rows) for rows in evaluations},
        "recipe": Table(("field", "value"), [(key, shown(value)) for key, value in record.set_fields.items()]),
        "recipe_note": "Fields that are not at their defaults." if record.recipe else "All its fields, as they are.",
        "recipe_text": dump_recipe(record.recipe) if record.recipe else yaml.safe_dump(dict(record.values)),
        "versions": _versions(record, lives),
    }  # fmt: skip
    content["sections"] = _sections(content)
    return render("run.html.j2", content)


def newest_rows(record: Record, num_worst: int) -> list[Rows]:
    """Rows of each set's newest evaluation that still has its file."""
    found = []
    for name in record.set_names:
        steps = [line["step"] for line in record.evaluations if line["set"] == name]
        rows = (read_rows(record.run, name, step, num_worst) for step in reversed(steps))
        found.append(next((entry for entry in rows if entry is not None), None))
    return [rows for rows in found if rows is not None]


def score_table(record: Record, evaluations: Sequence[Rows]) -> Table:
    """Of each set its newest score and its lowest WER."""
    sure = {(rows.set_name, rows.step): half_width(rows.errors.values()) for rows in evaluations}
    cells = []
    for name in record.set_names:
        lines = [line for line in record.evaluations if line["set"] == name]
        last, best = lines[-1], min(lines, key=lambda line: line["wer"])
        words = last.get("words", {})
        cells.append([
            name, last["step"], with_width(last["wer"], sure.get((name, last["step"]))), percent(last.get("cer")),
            words.get("substitutions"), words.get("deletions"), words.get("insertions"), last.get("num_rows"),
            last.get("num_refused"), percent(best["wer"]), best["step"],
        ])  # fmt: skip
    header = ("set", "step", "WER", "CER", "S", "D", "I", "rows", "refused", "lowest WER", "at step")
    return Table(header, cells)


def with_width(rate: float, width: float | None) -> str:
    """`9.16 % ± 0.71`."""
    return percent(rate) if width is None else f"{percent(rate)} ± {100 * width:.2f}"


def shown(value: Any) -> str:
    """A recipe's value on one line, as YAML has it."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")


def _state(record: Record, lives: Sequence[Life]) -> str:
    """How the run is, in a few words."""
    if record.done:
        return f"Done after {record.done.get('step', 0):,} steps."
    if not lives:
        return "Not started."
    last = lives[-1]
    return f"{last.name}: {last.ending.replace('_', ' ')}. {last.message}".strip()


def _notices(record: Record) -> list[str]:
    found = []
    if not record.training:
        found.append("No training line has been written yet; there are no curves to draw.")
    if record.num_torn:
        lines = "line" if record.num_torn == 1 else "lines"
        found.append(
            f"{record.num_torn} {lines} of metrics.jsonl cannot be read and {'is' if record.num_torn == 1 else 'are'}"
            " left out: a kill or a full disk tore them."
        )
    if record.recipe is None:
        first = record.recipe_problem.partition("\n")[0]
        found.append(f"The recipe is shown as it stands, for this version cannot check it: {first}")
    return found


def _facts(record: Record, lives: Sequence[Life]) -> list[tuple[str, Any]]:
    """The cards at the top."""
    last: Mapping[str, Any] = record.training[-1] if record.training else {}
    max_steps = record.latest("max_steps")
    ledger = run_ledger(lives)
    facts: list[tuple[str, Any]] = [
        ("steps", f"{last.get('step', 0):,}" + (f" of {max_steps:,}" if max_steps else "")),
        ("loss, newest line", last.get("loss")),
    ]
    for name in record.set_names[:4]:
        lowest = min(line["wer"] for line in record.evaluations if line["set"] == name)
        facts.append((f"lowest WER, {name}", percent(lowest)))
    facts += [
        ("wall time", duration(ledger.wall_s)),
        ("useful compute", percent(ledger.shares.get("compute"), 1)),
        ("speech trained on", duration(record.done.get("audio_s"))),
        ("attempts", sum(life.attempt is not None for life in lives)),
        ("steps lost", sum(life.num_lost_steps for life in lives)),
        ("processes", record.latest("world_size")),
        ("device", record.latest("device")),
        ("parameters", record.latest("num_parameters")),
    ]
    return [(name, value) for name, value in facts if value not in (None, NOTHING)]


def _attempts(lives: Sequence[Life]) -> Table:
    header = (
        "attempt", "start", "ranks", "hosts", "began", "lasted", "queued", "from step", "to step", "steps lost",
        "ended",        "what was said",
    )  # fmt: skip
    cells = [
        [
            NOTHING if life.attempt is None else life.attempt, life.start, life.world_size, ", ".join(life.hosts),
            clock(life.began), duration(life.wall_s) if life.ended else None,
            duration(life.queue_s) if life.queue_s else None, life.first_step, life.last_step, life.num_lost_steps,
            life.ending.replace("_", " "), life.message,
        ]
        for life in lives
    ]  # fmt: skip
    return Table(header, cells)


def _checkpoints(record: Record) -> Table:
    header = ("checkpoint", "attempt", "ranks", "size", "score", "state")
    cells = []
    for found in checkpoints.found(record.run.checkpoints):
        score = f"{found.score[0]} {found.score[1]:.4f}" if found.score else None
        manifest = found.manifest
        cells.append([
            found.name, manifest.get("attempt"), manifest.get("world_size"), size(found.size_bytes), score,
            found.problem or "complete, by names and sizes",
        ])  # fmt: skip
    return Table(header, cells)


def _corpus_table(speech: Speech) -> Table:
    cells = []
    for name, entry in speech.summary.items():
        refused = sum(entry["rejected"].values())
        share = percent(refused / max(1, entry["rows"] + refused))
        cells.append([name, entry["rows"], f"{entry['hours']:.2f}", refused, share])
    tokens = speech.corpus.vocabulary.tokens
    note = f"Vocabulary: {len(tokens)} tokens: {' '.join(tokens)}"
    return Table(("set", "rows kept", "hours", "rows refused", "share"), cells, note)


def _rejected_table(speech: Speech) -> Table:
    cells = [
        [reason, name, count, entry["examples"].get(reason)]
        for name, entry in speech.summary.items()
        for reason, count in entry["rejected"].items()
    ]
    return Table(("reason", "set", "rows", "for example"), cells)


def _clips(speech: Speech | None, no_corpus: str, evaluations: Sequence[Rows], wishes: Wishes) -> tuple[Clips, str]:
    """Recordings of the worst utterances, as far as they were asked for, are there, and fit."""
    clips = Clips(wishes.audio_bytes)
    if not wishes.audio_bytes:
        return clips, "To listen to them, make the report with --audio."
    if speech is None:
        say(f"no recordings: {no_corpus}")
        return clips, f"No recordings: {no_corpus}"
    for rows in evaluations:
        if rows.set_name in speech.corpus.sets:
            try:
                clips.add(speech.corpus.sets[rows.set_name], [row["id"] for row in rows.worst])
            except CorpusError as error:
                say(f"no recordings of {rows.set_name}: {error}")
    note = f"{len(clips.found)} recordings, {size(clips.used_bytes)}; what the model heard, at 16 kHz."
    if clips.num_left_out:
        note += f" {clips.num_left_out} more are left out, over {wishes.audio_bytes / _MB:g} MB (--audio MB)."
    return clips, note


def _confusions(rows: Rows) -> Table:
    cells = [[expected or "(nothing)", heard or "(nothing)", count] for expected, heard, count in rows.confusions]
    return Table(("reference", "heard", "times"), cells)


def _versions(record: Record, lives: Sequence[Life]) -> Table:
    """What the newest attempt ran with."""
    last = next((life.facts for life in reversed(lives) if life.attempt is not None), {})
    git = last.get("git") or {}
    changes = " with uncommitted changes" if git.get("uncommitted_changes") else ""
    pairs = [
        *(last.get("versions") or {}).items(), ("Python", last.get("python")), ("platform", last.get("platform")),
        ("git commit", f"{git['commit']}{changes}" if git.get("commit") else None), ("strategy", last.get("strategy")),
        ("precision", last.get("precision")), ("run id", record.identity.get("run_id")),
        *((key.replace("_", " "), last.get(key)) for key in ("recipe_hash", "corpus_hash", "plan_hash")),
        ("run directory", str(record.run.path)),
    ]  # fmt: skip
    return Table(("what", "version"), [(name, value) for name, value in pairs if value is not None])


def _sections(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Links at the top of the page."""
    every = [
        ("training", "Training", "training"), ("scores", "Scores", "scores"), ("time", "Time", None),
        ("attempts", "Attempts", None), ("ranks", "Ranks", None), ("data", "Data", None),
        ("utterances", "Utterances", "evaluations"), ("recipe", "Recipe", None),
    ]  # fmt: skip
    return [(key, name) for key, name, needs in every if needs is None or content[needs]]
