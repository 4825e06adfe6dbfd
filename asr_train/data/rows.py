"""Rows of a source before they are prepared: a table of ids and texts, and references to audio that workers load."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from asr_train.data import audio
from asr_train.errors import CorpusError

_CHUNK_ROWS = 10_000  # rows that are Python objects at once while a table is listed
_SHOWN = 20  # errors of one kind that a message spells out


class AudioRef(Protocol):
    """Audio of one row, not loaded yet; small, picklable, loaded in a worker."""

    def load(self) -> npt.NDArray[np.int16]:
        """Mono 16 kHz samples. Raises `audio.AudioError`."""
        ...


@dataclass(frozen=True)
class FileAudio:
    """A file, or a segment of it."""

    path: Path
    offset_s: float | None = None
    duration_s: float | None = None
    roots: tuple[str, ...] = ()  # real folders that a link may not lead out of; anywhere when empty

    def load(self) -> npt.NDArray[np.int16]:
        """See `AudioRef`."""
        return audio.decode(self.checked(), self.offset_s, self.duration_s)

    def checked(self) -> Path:
        """The file.

        Raises:
            audio.AudioError: it is a link, or lies behind one, that leads out of `roots`.
        """
        if problem := leads_out(self.path, self.roots):
            raise audio.AudioError(audio.OUTSIDE, problem)
        return self.path


@dataclass(frozen=True)
class BytesAudio:
    """An encoded file that is in memory already."""

    data: bytes

    def load(self) -> npt.NDArray[np.int16]:
        """See `AudioRef`."""
        return audio.decode(self.data)


def leads_out(path: Path, roots: Sequence[str]) -> str | None:
    """What to say of a path that links lead out of all of these real folders; None where they do not."""
    real = os.path.realpath(path)
    if not roots or any(real.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        return None
    return f"{path} is a link to {real}; allow_paths_outside_root=true follows it"


class Speaker(Protocol):
    """A row that makes its own audio."""

    def synthesise(self) -> npt.NDArray[np.int16]:
        """Mono 16 kHz samples."""
        ...


@dataclass(frozen=True)
class SpokenAudio:
    """Audio that a synthesiser speaks."""

    speaker: Speaker

    def load(self) -> npt.NDArray[np.int16]:
        """See `AudioRef`."""
        return self.speaker.synthesise()


@dataclass(frozen=True)
class NoAudio:
    """A row whose audio cannot even be referred to."""

    value: str

    def load(self) -> npt.NDArray[np.int16]:
        """See `AudioRef`."""
        raise audio.AudioError(audio.MISSING_FILE, self.value)


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    id: str
    text: str | None
    source: str  # for people: file:line, or data set[row]
    audio: AudioRef


class SourceError(CorpusError):
    """A source cannot be read; `problems` names each thing that is wrong, with file and row."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        more = len(self.problems) - _SHOWN
        listed = "".join(f"\n  {problem}" for problem in self.problems[:_SHOWN])
        super().__init__(f"bad input:{listed}" + (f"\n  and {more} more" if more > 0 else ""))


@dataclass(frozen=True)
class Listing:
    """All rows of a source, listed: texts and ids as an Arrow table, audio by row number.

    `table` has the columns id, text, source, and whatever the source needs to find its audio.
    """

    table: pa.Table
    audio: Callable[[pa.Table, Sequence[int]], Iterable[AudioRef]]  # (rows of the table, their numbers) -> audio
    numbers: npt.NDArray[np.int64] | None = None  # numbers of the rows in the source, where some were selected
    random_access: bool = True
    files: tuple[Path, ...] = ()  # that the table was read from: a later change of them is noticed

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def texts(self) -> Iterator[str | None]:
        """Texts of all rows, in order."""
        for batch in self.table.select(["text"]).to_batches(max_chunksize=_CHUNK_ROWS):
            yield from batch.column(0).to_pylist()

    def rows(self, start: int, stop: int) -> list[Row]:
        """Some rows, as picklable objects."""
        part = self.table.slice(start, stop - start)
        numbers = range(start, stop) if self.numbers is None else self.numbers[start:stop].tolist()
        columns = (part.column(name).to_pylist() for name in ("id", "text", "source"))
        references = self.audio(part, numbers)
        return [Row(*values) for values in zip(*columns, references, strict=True)]

    def select(self, numbers: npt.NDArray[np.int64]) -> Self:
        """Some rows of a listing that is not itself a selection."""
        assert self.numbers is None
        return replace(self, table=self.table.take(pa.array(numbers)), numbers=numbers)

    def prefixed(self, prefix: str) -> Self:
        """The listing with a prefix before every id, so that ids of several sources stay apart."""
        ids = surround(prefix, self.table.column("id"))
        position = self.table.schema.get_field_index("id")
        return replace(self, table=self.table.set_column(position, "id", ids))

    def digest(self, columns: Sequence[str] | None = None) -> str:
        """Hash of the table, or of some columns: a resumed prepare goes on only if it lists the same rows."""
        sink = _HashSink()
        table = (self.table if columns is None else self.table.select(columns)).combine_chunks()
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
            writer.write_table(table, max_chunksize=_CHUNK_ROWS)
        return sink.hash.hexdigest()


class _HashSink:
    """A file that hashes what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.hash = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def make_table(rows: Iterable[dict[str, Any]], extra: Sequence[pa.Field] = ()) -> pa.Table:
    """An Arrow table of id, text, source and extra columns; few rows are Python objects at once."""
    schema = pa.schema([pa.field(name, pa.large_string()) for name in ("id", "text", "source")] + list(extra))
    batches, pending = [], []
    for row in rows:
        pending.append(row)
        if len(pending) == _CHUNK_ROWS:
            batches.append(pa.RecordBatch.from_pylist(pending, schema))
            pending = []
    batches.append(pa.RecordBatch.from_pylist(pending, schema))
    return pa.Table.from_batches(batches, schema)


def surround(prefix: str, column: pa.Array | pa.ChunkedArray, suffix: str = "") -> pa.Array | pa.ChunkedArray:
    """A column of large strings with something before and after each."""
    text = pa.large_string()
    return pc.binary_join_element_wise(pa.scalar(prefix, text), column, pa.scalar(suffix, text), pa.scalar("", text))


def duplicates(table: pa.Table) -> list[str]:
    """What is wrong with the ids of a table: each row whose id an earlier row has."""
    ids = table.column("id")
    if pc.count_distinct(ids).as_py() == table.num_rows:
        return []
    first: dict[str, str] = {}
    problems = []
    for name, source in zip(ids.to_pylist(), table.column("source").to_pylist(), strict=True):
        if name in first:
            problems.append(f"{source}: id {name!r} again, first in {first[name]}")
        else:
            first[name] = source
    return problems


def split_numbers(num_rows: int, test_fraction: float, seed: int, part: str) -> npt.NDArray[np.int64]:
    """Rows of one part of a random split, ascending: the same rows as datasets' `train_test_split` puts there.

    `datasets.Dataset.train_test_split(test_size=test_fraction, seed=seed)` permutes the rows with numpy's default
    generator; the first ceil(test_fraction * num_rows) are its test part.
    """
    permutation = np.random.default_rng(seed).permutation(num_rows)
    num_test = ceil(test_fraction * num_rows)
    return np.sort(permutation[:num_test] if part == "test" else permutation[num_test:]).astype(np.int64)
