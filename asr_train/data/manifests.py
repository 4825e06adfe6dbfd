"""Tables of text that name audio files: JSON lines in NeMo's form, CSV, TSV."""

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from asr_train.config import TableSource
from asr_train.data.rows import AudioRef, FileAudio, Listing, SourceError, duplicates, leads_out, make_table

ID_COLUMNS = ("id", "utt_id")
AUDIO_COLUMNS = ("audio", "audio_filepath", "path", "file", "file_name", "filename", "wav")
TEXT_COLUMNS = ("transcription", "sentence", "text", "transcript")
_SUFFIXES = {
    "jsonl": (".jsonl", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
FILE_COLUMNS = (pa.field("path", pa.large_string()), pa.field("offset_s", pa.float64()),
                pa.field("duration_s", pa.float64()))  # fmt: skip


def open_manifest(source: TableSource) -> Listing:
    """List the rows of JSON lines, CSV or TSV.

    Raises:
        SourceError: missing files or columns, lines that are no rows, paths outside their root, duplicate ids.
    """
    problems: list[str] = []
    files = table_files(source.path, source.kind)
    table = make_table((row for path in files for row in _rows(path, source, problems)), FILE_COLUMNS)
    if problems or (problems := duplicates(table)):
        raise SourceError(problems)
    folders = {Path(source.audio_root)} if source.audio_root else {path.parent for path in files}
    roots = () if source.allow_paths_outside_root else tuple(sorted(map(os.path.realpath, folders)))
    return Listing(table=table, audio=partial(file_references, roots=roots), files=tuple(files))


def file_references(part: pa.Table, _: Sequence[int], roots: tuple[str, ...] = ()) -> Iterable[AudioRef]:
    """References to the audio files that a table's `FILE_COLUMNS` name; see `FileAudio` for `roots`."""
    columns = (part.column(field.name).to_pylist() for field in FILE_COLUMNS)
    return (FileAudio(Path(path), offset, duration, roots) for path, offset, duration in zip(*columns, strict=True))


def table_files(path: str, kind: str) -> list[Path]:
    """The files that `path` means: itself, those of a folder, or those of a pattern, sorted.

    Raises:
        SourceError: there are none.
    """
    given = Path(path)
    if given.is_file():
        return [given]
    suffixes = _SUFFIXES[kind]
    if given.is_dir():
        found = sorted(file for file in given.iterdir() if file.suffix in suffixes and file.is_file())
        if not found:
            raise SourceError([f"{path}: the folder has no {' or '.join(suffixes)} file"])
        return found
    found = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise SourceError([f"{path}: no such file"])
    return found


def pick_column(columns: Sequence[str], given: str | None, known: Sequence[str]) -> str | None:
    """The column given, or the first known one that a table has; None when it has none."""
    if given is not None:
        return given if given in columns else None
    return next((name for name in known if name in columns), None)


class PathCheck:
    """Makes paths of a manifest absolute, and refuses those that leave their root; links are followed when read."""

    def __init__(self, root: Path, allow_outside: bool) -> None:
        self._root = os.path.normpath(root.absolute())
        self._roots = (self._root, os.path.realpath(root))
        self._allow_outside = allow_outside

    @property
    def roots(self) -> tuple[str, ...]:
        """The real folder that links may not lead out of; none where they may."""
        return () if self._allow_outside else self._roots[1:]

    def leads_out(self, path: str) -> str | None:
        """What is wrong with a path that a link leads out of the root; asked where it is read, for it asks the disk."""
        return leads_out(Path(path), self.roots)

    def __call__(self, name: str) -> tuple[str, str | None]:
        """The absolute path, and what is wrong with it or None."""
        path = os.path.normpath(name if name.startswith(os.sep) else f"{self._root}{os.sep}{name}")
        if self._allow_outside or any(path.startswith(root.rstrip(os.sep) + os.sep) for root in self._roots):
            return path, None
        return path, f"{name!r} leaves {self._root}; set audio_root, or allow_paths_outside_root=true"


def _rows(path: Path, source: TableSource, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one file as `make_table` takes them; what is wrong goes to `problems`."""
    check = PathCheck(Path(source.audio_root) if source.audio_root else path.parent, source.allow_paths_outside_root)
    lines = _json_lines(path, problems) if source.kind == "jsonl" else _delimited(path, source.kind, problems)
    columns: tuple[str | None, str, str | None] | None = None
    for number, values in lines:
        if columns is None:
            columns = _find_columns(path, source, list(values), problems)
            if columns is None:
                return
        row, problem = _row(f"{path}:{number}", values, columns, check)
        if problem is not None:
            problems.append(f"{path}:{number}: {problem}")
        else:
            yield row
    if columns is None and not problems:
        problems.append(f"{path}: no rows")


def _find_columns(
    path: Path, source: TableSource, found: list[str], problems: list[str]
) -> tuple[str | None, str, str | None] | None:
    """Names of the id, audio and text columns; None, and why, when one that is needed is missing."""
    audio_column = pick_column(found, source.audio_column, AUDIO_COLUMNS)
    text_column = pick_column(found, source.text_column, TEXT_COLUMNS)
    lacking = [
        f"{path}: no {what} column{f' {given!r}' if given else ''} (set {what}_column); it has: {', '.join(found)}"
        for what, given, column in (
            ("audio", source.audio_column, audio_column),
            ("text", source.text_column, text_column),
        )
        if column is None
    ]
    problems.extend(lacking)
    if audio_column is None or lacking:
        return None
    return pick_column(found, None, ID_COLUMNS), audio_column, text_column


def _row(
    source: str, values: dict[str, Any], columns: tuple[str | None, str, str | None], check: PathCheck
) -> tuple[dict[str, Any], str | None]:
    """One row of a manifest, and what is wrong with it or None."""
    id_column, audio_column, text_column = columns
    name, text = values.get(audio_column), values.get(text_column or "")
    if not isinstance(name, str) or not name:
        return {}, f"{audio_column}: expected a path, found {name!r}"
    if text is not None and not isinstance(text, str):
        return {}, f"{text_column}: expected text, found {text!r}"
    times = {}
    for key in ("offset", "duration"):
        try:
            times[key] = None if values.get(key) in (None, "") else float(values[key])
        except (TypeError, ValueError):
            return {}, f"{key}: expected seconds, found {values[key]!r}"
        if times[key] is not None and not 0 <= times[key] < float("inf"):  # type: ignore[operator]
            return {}, f"{key}: expected seconds, found {values[key]!r}"
    path, problem = check(name)
    row_id = values.get(id_column) if id_column else None
    if row_id is None:
        row_id = name if times["offset"] is None else f"{name}#{times['offset']:g}"
    row = {"id": str(row_id), "text": text, "source": source, "path": path}
    return {**row, "offset_s": times["offset"], "duration_s": times["duration"]}, problem


def _json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON-lines file, with their line numbers."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\ud" in line.lower():  # half of a surrogate pair is no character
                    json.dumps(values, ensure_ascii=False).encode("utf-8")
            except (ValueError, RecursionError) as error:
                problems.append(f"{path}:{number}: not JSON: {error}")
                continue
            if isinstance(values, dict):
                yield number, values
            else:
                problems.append(f"{path}:{number}: expected an object, found {type(values).__name__}")


def _delimited(path: Path, kind: str, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file (quoted as usual) or a TSV file (never quoted), with the lines that they end on."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"strict": True}
        reader = csv.reader(stream, **options)
        try:
            header = next(reader, [])
            for fields in reader:
                if len(fields) == len(header):
                    yield reader.line_num, dict(zip(header, fields, strict=True))
                elif fields:
                    problems.append(f"{path}:{reader.line_num}: {len(fields)} fields, the header has {len(header)}")
        except (csv.Error, UnicodeDecodeError) as error:
            problems.append(f"{path}:{reader.line_num + 1}: not a {kind.upper()} table: {error}")
