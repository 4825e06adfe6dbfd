"""Shards -> the rest of a corpus: lengths, index, list of refused rows, counts."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from asr_train.data.corpus import read_batches, shard_path
from asr_train.data.lengths import LengthIndex
from asr_train.data.shards import rejected_path
from asr_train.errors import CorpusError
from asr_train.files import atomic_file, read_jsonl
from asr_train.geometry import SAMPLE_RATE

_TEXTS_SHOWN = 6


def finish_set(folder: Path, num_shards: int) -> dict[str, Any]:
    """Write a set's lengths and index.

    Returns:
        rows, hours, rejected (reason -> rows), examples (reason -> one), texts (pairs: as it came, normalised).
    """
    samples: list[npt.NDArray[np.int64]] = []
    labels: list[npt.NDArray[np.int64]] = []
    shard_rows: list[int] = []
    texts: list[tuple[str, str]] = []
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number in range(num_shards):
        batches = read_batches(shard_path(folder, number))
        shard_rows.append(sum(batch.num_rows for batch in batches))
        samples += [batch.column("num_samples").to_numpy() for batch in batches]
        labels += [batch.column("labels").value_lengths().to_numpy() for batch in batches]
        if batches and len(texts) < _TEXTS_SHOWN:
            texts += _changed_texts(batches[0])
        for entry in read_jsonl(rejected_path(folder, number)):
            reasons[entry["reason"]] += 1
            examples.setdefault(entry["reason"], f"{entry['id']}: {entry['value']}")
    num_samples = _save(folder / "num_samples.npy", samples)
    _save(folder / "num_labels.npy", labels)
    _save(folder / "shard_rows.npy", [np.array(shard_rows)])
    if len(num_samples):
        LengthIndex.build(num_samples).save(folder / "index")
    return {
        "rows": len(num_samples),
        "hours": float(num_samples.sum()) / SAMPLE_RATE / 3600,
        "rejected": dict(reasons.most_common()),
        "examples": examples,
        "texts": texts[:_TEXTS_SHOWN],
    }


def write_rejected(path: Path, num_shards: dict[str, int]) -> None:
    """Write rejected.jsonl: all refused rows, in the order of sets and rows."""
    with atomic_file(path / "rejected.jsonl", "w") as stream:
        for name, count in num_shards.items():
            for number in range(count):
                for entry in read_jsonl(rejected_path(path / name, number)):
                    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def check_counts(sets: dict[str, dict[str, Any]], max_rejected_percent: float, path: Path) -> None:
    """Refuse a corpus that refused too much.

    Raises:
        CorpusError: a set refused more than `max_rejected_percent` of its rows, or has none left.
    """
    problems = []
    for name, entry in sets.items():
        refused = sum(entry["rejected"].values())
        num_rows = entry["rows"] + refused
        percent = 100 * refused / max(1, num_rows)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in entry["rejected"].items()) or "it had none"
        if percent > max_rejected_percent:
            problems.append(f"set {name}: {refused:,} of {num_rows:,} rows ({percent:.1f} %): {reasons}")
        elif not entry["rows"]:
            problems.append(f"set {name}: no rows are left: {reasons}")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise CorpusError(
            f"more rows were refused than data.max_rejected_percent={max_rejected_percent:g} allows:{listed}\n"
            f"every refused row is in {path / 'rejected.jsonl'}, with its reason\n"
            "mend the data, or raise that limit and run the same command again: what is done is kept"
        )


def _changed_texts(batch: pa.RecordBatch) -> list[tuple[str, str]]:
    """A few texts before and after normalisation, changed ones first."""
    columns = (batch.column(name).slice(0, 200).to_pylist() for name in ("raw_text", "text"))
    pairs = list(zip(*columns, strict=True))
    return sorted(pairs, key=lambda pair: pair[0] == pair[1])[:_TEXTS_SHOWN]


def _save(path: Path, parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    array = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    with atomic_file(path) as stream:
        np.save(stream, array)
    return array
