"""Rows of a source -> one shard of the corpus: loaded, checked, encoded, written aside and renamed. Runs in workers."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from asr_train.config import TextSettings
from asr_train.data.audio import MISSING_FILE, AudioError, is_silent, to_flac
from asr_train.data.corpus import SCHEMA, shard_path
from asr_train.data.rows import Row
from asr_train.data.text import Normaliser, Vocabulary
from asr_train.files import atomic_file, read_jsonl
from asr_train.geometry import SAMPLE_RATE, FrameGeometry, ctc_min_frames

_BATCH_BYTES = 32 * 2**20  # audio of one record batch, and so about what a worker holds in memory


@dataclass(frozen=True, kw_only=True)
class RowChecks:
    """What turns a row into an utterance of one set, or refuses it.

    Refusals for text, length, silence and alignment hold for training only: an evaluation set keeps every row with
    audio that decodes and a reference, so that its WER leaves nothing hard out.
    """

    training: bool
    text: TextSettings
    vocabulary: Vocabulary
    unknown_characters: Literal["reject", "remove", "unk"]
    geometry: FrameGeometry
    min_duration_s: float
    max_duration_s: float
    encoding: Literal["pcm16", "flac"]


@dataclass(frozen=True)
class Rejected:
    """A row that was refused, and why; one line of rejected.jsonl."""

    set: str
    row: int  # in the set's sources, from 0
    id: str
    reason: str
    value: str
    source: str


class _RefusedError(Exception):
    """`reason` and `value` of a row that is refused."""

    def __init__(self, reason: str, value: str) -> None:
        self.reason = reason
        self.value = value
        super().__init__(reason)


def write_shard(folder: Path, number: int, first_row: int, rows: Sequence[Row], checks: RowChecks) -> int:
    """Prepare some rows and write `folder/shard-<number>.arrow`, with its list of refused rows beside it.

    The list comes first: a shard that exists has its list. Returns the number of rows, refused ones included.
    """
    normalise = Normaliser(checks.text)
    rejected: list[Rejected] = []

    def utterances() -> Iterator[dict[str, Any]]:
        for position, row in enumerate(rows):
            try:
                yield _utterance(row, normalise, checks)
            except (_RefusedError, AudioError) as refused:
                where = (folder.name, first_row + position, row.id)
                rejected.append(Rejected(*where, refused.reason, refused.value, row.source))

    with atomic_file(shard_path(folder, number)) as stream:
        with pa.ipc.new_stream(stream, SCHEMA) as writer:
            for batch in _batches(utterances()):
                writer.write_batch(batch)
        with atomic_file(rejected_path(folder, number), "w") as lines:
            lines.writelines(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in rejected)
    return len(rows)


def rejected_path(folder: Path, number: int) -> Path:
    """File with the refused rows of a shard, until the corpus is complete."""
    return folder / f"shard-{number:05d}.rejected.jsonl"


def mended_shards(folder: Path) -> list[Path]:
    """Shards with a row that was refused because its file was not there, and the file is there now."""
    found = []
    for path in sorted(folder.glob("shard-*.rejected.jsonl")):
        gone = (entry["value"] for entry in read_jsonl(path) if entry["reason"] == MISSING_FILE)
        if any(Path(value).is_file() for value in gone):
            found.append(path.with_name(path.name.removesuffix(".rejected.jsonl") + ".arrow"))
    return found


def end_with_parent(stop: Connection) -> None:
    """Let this worker end when the process that started it says so, or is gone: an orphan would wait for ever.

    Ctrl-C is left to that process, which says what happened.

    Args:
        stop: whose other end that process alone has, and closes. (An event would have it wait for every worker that
            waits for the event, a killed one too.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        stop.poll(None)  # until the other end is closed
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _batches(utterances: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Record batches of about `_BATCH_BYTES` of audio."""
    pending: list[dict[str, Any]] = []
    size = 0
    for utterance in utterances:
        pending.append(utterance)
        size += len(utterance["audio"])
        if size >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(pending, SCHEMA)
            pending, size = [], 0
    if pending:
        yield pa.RecordBatch.from_pylist(pending, SCHEMA)


def _utterance(row: Row, normalise: Normaliser, checks: RowChecks) -> dict[str, Any]:
    """One row of the corpus."""
    text = normalise(row.text or "")
    if not text:
        raise _RefusedError("empty text", "no text" if row.text is None else repr(row.text))
    text, labels = _labels(text, checks)
    waveform = row.audio.load()
    if checks.training:
        _check_audio(waveform, labels, checks)
    encoded = to_flac(waveform) if checks.encoding == "flac" else waveform.astype("<i2", copy=False).tobytes()
    return {
        "id": row.id,
        "audio": encoded,
        "num_samples": len(waveform),
        "text": text,
        "raw_text": row.text,
        "labels": labels,
        "source": row.source,
    }


def _labels(text: str, checks: RowChecks) -> tuple[str, list[int]]:
    """A training row's text as it is learnt, or an evaluation row's reference as it is scored; and the labels."""
    vocabulary = checks.vocabulary
    unknown = vocabulary.unknown(text)
    if not checks.training and vocabulary.collisions(text):
        return text, []
    if not unknown or checks.unknown_characters == "unk":
        return text, vocabulary.encode(text)
    if checks.unknown_characters == "remove":
        learnt = vocabulary.without_unknown(text)
        if checks.training and not learnt:
            raise _RefusedError("empty text", f"{text!r} without characters outside the vocabulary")
        return (learnt if checks.training else text), vocabulary.encode(learnt)
    if checks.training:
        raise _RefusedError("unknown characters", " ".join(unknown))
    return text, []


def _check_audio(waveform: npt.NDArray[np.int16], labels: Sequence[int], checks: RowChecks) -> None:
    """Refuse what cannot be trained on."""
    duration_s = len(waveform) / SAMPLE_RATE
    num_frames = checks.geometry.num_frames(len(waveform))
    if duration_s < checks.min_duration_s or num_frames < 1:
        raise _RefusedError("too short", f"{duration_s:.3f} s")
    if duration_s > checks.max_duration_s:
        raise _RefusedError("too long", f"{duration_s:.3f} s")
    if is_silent(waveform):
        raise _RefusedError("silence", f"{duration_s:.3f} s")
    needed = ctc_min_frames(labels)
    if num_frames < needed:
        raise _RefusedError("unalignable", f"{num_frames} frames, the text needs {needed}")
