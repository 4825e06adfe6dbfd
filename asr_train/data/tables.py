"""Parquet and Arrow tables with the audio inside, as hub data sets have them: read in place, never loaded whole."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from asr_train.config import TableSource
from asr_train.data import audio
from asr_train.data.manifests import AUDIO_COLUMNS, ID_COLUMNS, TEXT_COLUMNS, PathCheck, pick_column, table_files
from asr_train.data.rows import AudioRef, Listing, SourceError, duplicates, surround

_PATH_COLUMNS = ("path", "file", "file_name")  # that give a row its id, where the audio itself has no path


@dataclass(frozen=True)
class TableAudio:
    """Audio in a cell of a Parquet row group or an Arrow record batch."""

    path: Path
    column: str
    group: int
    row: int
    root: Path  # that paths in the cell start from
    allow_outside: bool

    def load(self) -> npt.NDArray[np.int16]:
        """See `AudioRef`."""
        return audio.decode(self.encoded())

    def encoded(self) -> bytes | Path:
        """The audio as it came: the content of a file, or the file.

        Raises:
            audio.AudioError: as `encoded_in`.
        """
        cells = _cells(self.path, self.column, self.group)
        return encoded_in(cells[self.row].as_py(), PathCheck(self.root, self.allow_outside))


def encoded_in(cell: Any, check: PathCheck) -> bytes | Path:
    """What a cell of an audio column holds: bytes, a path, or a struct of both, as `datasets` writes it.

    Raises:
        audio.AudioError: neither, and `path outside its root`.
    """
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    if isinstance(data, bytes):
        return data
    if not isinstance(name, str):
        raise audio.AudioError(audio.MISSING_FILE, "neither bytes nor a path")
    path, problem = check(name)
    if problem is not None:
        raise audio.AudioError(audio.OUTSIDE, problem)
    if problem := check.leads_out(path):
        raise audio.AudioError(audio.OUTSIDE, problem)
    return Path(path)


def open_table(source: TableSource) -> Listing:
    """List the rows of Parquet or Arrow files; the audio stays where it is.

    Raises:
        SourceError: missing files or columns, no tables, duplicate ids.
    """
    problems: list[str] = []
    files = table_files(source.path, source.kind)
    parts = []
    for path in files:
        try:
            parts.append(_list_file(path, source))
        except SourceError as error:
            problems += error.problems
        except (OSError, pa.ArrowException) as error:
            problems.append(f"{path}: not a {source.kind} table: {error}")
    if problems:
        raise SourceError(problems)
    table = with_ids(pa.concat_tables(parts))
    if problems := duplicates(table):
        raise SourceError(problems)

    def references(part: pa.Table, _: Sequence[int]) -> Iterable[AudioRef]:
        for name, column, group, row in zip(
            *(part.column(key).to_pylist() for key in ("file", "audio_column", "group", "row")), strict=True
        ):
            root = Path(source.audio_root) if source.audio_root else Path(name).parent
            yield TableAudio(Path(name), column, group, row, root, source.allow_paths_outside_root)

    return Listing(table=table, audio=references, files=tuple(files))


def with_ids(table: pa.Table) -> pa.Table:
    """Make the id column: the table's own ids; else the names of audio files, if they differ; else row numbers.

    Takes the columns own_id, name, text, source and more; gives id in the place of the first two.
    """
    own, names = table.column("own_id"), table.column("name")
    if own.null_count == 0:
        ids = own
    elif names.null_count == 0 and pc.count_distinct(names).as_py() == table.num_rows:
        ids = names
    else:
        ids = pc.cast(pa.array(np.arange(table.num_rows)), pa.large_string())
    return table.drop_columns(["own_id", "name"]).add_column(0, "id", ids)


def pick_columns(
    where: str, found: Sequence[str], audio_column: str | None, text_column: str | None
) -> tuple[str, str]:
    """Names of the audio and text columns.

    Raises:
        SourceError: one is missing.
    """
    audio_name = pick_column(found, audio_column, AUDIO_COLUMNS)
    text_name = pick_column(found, text_column, TEXT_COLUMNS)
    wanted = (("audio", audio_column, audio_name), ("text", text_column, text_name))
    problems = [
        f"{where}: no {what} column{f' {given!r}' if given else ''} (set {what}_column); it has: {', '.join(found)}"
        for what, given, name in wanted
        if name is None
    ]
    if audio_name is None or text_name is None:
        raise SourceError(problems)
    return audio_name, text_name


def strings(column: pa.ChunkedArray | pa.Array, what: str) -> pa.ChunkedArray | pa.Array:
    """A column as large strings.

    Raises:
        SourceError: it holds something else.
    """
    if pa.types.is_dictionary(column.type) or pa.types.is_null(column.type):
        column = pc.cast(column, pa.large_string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise SourceError([f"{what}: expected text, found {column.type}"])
    return pc.cast(column, pa.large_string())


def describe(part: pa.Table, audio_column: str, text_column: str, where: str) -> dict[str, Any]:
    """The columns own_id, name and text of a piece of a table; `name` is the audio's path, if it has one."""
    nothing = pa.nulls(part.num_rows, pa.large_string())
    own = next((name for name in ID_COLUMNS if name in part.column_names), None)
    cells = part.column(audio_column) if audio_column in part.column_names else None
    named = next((name for name in _PATH_COLUMNS if name in part.column_names), None)
    if cells is not None and pa.types.is_struct(cells.type) and cells.type.get_field_index("path") >= 0:
        names = pc.struct_field(cells, "path")
    elif cells is not None and (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        names = cells
    else:
        names = nothing if named is None else part.column(named)
    return {
        "own_id": nothing if own is None else pc.cast(part.column(own), pa.large_string()),
        "name": pc.cast(names, pa.large_string()),
        "text": strings(part.column(text_column), f"{where}: {text_column}"),
    }


def _list_file(path: Path, source: TableSource) -> pa.Table:
    """Rows of one file: own_id, name, text, source, audio_column, and their places."""
    pieces: list[pa.Table] = []
    first = 0
    audio_column, text_column = pick_columns(str(path), _schema(path).names, source.audio_column, source.text_column)
    for group, part in enumerate(_pieces(path, audio_column, text_column)):
        count = part.num_rows
        rows = np.arange(count)
        columns = describe(part, audio_column, text_column, str(path))
        columns["source"] = surround(f"{path}[", pc.cast(pa.array(rows + first), pa.large_string()), "]")
        columns["audio_column"] = pa.array([audio_column] * count, pa.large_string())
        columns["file"] = pa.array([str(path)] * count, pa.large_string())
        columns["group"] = pa.array(np.full(count, group))
        columns["row"] = pa.array(rows)
        pieces.append(pa.table(columns))
        first += count
    if not pieces:
        raise SourceError([f"{path}: no rows"])
    return pa.concat_tables(pieces)


def _schema(path: Path) -> pa.Schema:
    return pq.read_schema(path) if path.suffix == ".parquet" else _batches(path)[0]


def _pieces(path: Path, audio_column: str, text_column: str) -> Iterator[pa.Table]:
    """Each row group or record batch, without the bytes of its audio."""
    if path.suffix != ".parquet":
        schema, batches = _batches(path)
        yield from (pa.Table.from_batches([batch], schema) for batch in batches)
        return
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    kind = schema.field(audio_column).type
    light = [name for name in (*ID_COLUMNS, *_PATH_COLUMNS, text_column) if name in schema.names]
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        light.append(f"{audio_column}.path")
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        light.append(audio_column)
    for group in range(file.num_row_groups):
        yield file.read_row_group(group, columns=light)


@lru_cache(maxsize=2)
def _cells(path: Path, column: str, group: int) -> pa.ChunkedArray | pa.Array:
    """The audio column of a row group (read) or a record batch (mapped); rows of a shard lie together."""
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)
    return _batches(path)[1][group].column(column)


@lru_cache(maxsize=4)
def _batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Schema and record batches of an Arrow file, memory-mapped: a stream, as `datasets` writes, or the file format."""
    with path.open("rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
    mapped = pa.memory_map(str(path))
    if is_file:
        reader = pa.ipc.open_file(mapped)
        return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]
    stream_reader = pa.ipc.open_stream(mapped)
    return stream_reader.schema, list(stream_reader)
