"""Data sets of the Hugging Face hub, through `datasets`; audio stays encoded, `datasets` never decodes it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets.download.streaming_download_manager import xopen
from huggingface_hub import HfApi, constants

from asr_train.config import HubSource
from asr_train.data import audio
from asr_train.data.manifests import ID_COLUMNS, PathCheck
from asr_train.data.rows import AudioRef, BytesAudio, Listing, NoAudio, SourceError, duplicates, leads_out, make_table
from asr_train.data.tables import describe, encoded_in, pick_columns, with_ids
from asr_train.errors import CorpusError
from asr_train.trouble import remedy

_LIST_ROWS = 10_000  # at a time
_TIMEOUT_S = 10.0  # for the hub to say that it is there
_NAME_COLUMNS = ("path", "file", "file_name")


def _as_it_came(_: datasets.Audio, value: str | bytes | dict[str, Any]) -> dict[str, Any]:
    """An audio cell as a struct of bytes and path, nothing decoded."""
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return {"bytes": value.get("bytes"), "path": value.get("path")}


# datasets 5.2 asks for torchcodec even to note down the path of an audio file, which repositories of loose files need
datasets.Audio.encode_example = _as_it_came


@dataclass(frozen=True)
class HubAudio:
    """Audio of one row of a data set that is on this machine. Pickles as the paths of the data set's files."""

    dataset: datasets.Dataset  # one column, not decoded; shared by all rows of a shard
    row: int
    roots: tuple[Path, ...]  # of audio that is not in the data set itself but in files

    def load(self) -> npt.NDArray[np.int16]:
        """See `AudioRef`."""
        (cell,) = self.dataset[self.row].values()
        return audio.decode(encoded_in(cell, _RootsCheck(self.roots)))


class _RootsCheck(PathCheck):
    """Accepts paths in any of several folders."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._checks = [PathCheck(root, allow_outside=False) for root in roots]

    def __call__(self, name: str) -> tuple[str, str | None]:
        """See `PathCheck`."""
        found = [check(name) for check in self._checks]
        return next((pair for pair in found if pair[1] is None), found[0])

    def leads_out(self, path: str) -> str | None:
        """See `PathCheck.leads_out`."""
        return leads_out(Path(path), [root for check in self._checks for root in check.roots])


def open_hub(source: HubSource, limit: int | None = None) -> Listing:
    """List the rows of a hub data set, or of a local folder that `datasets` can load.

    Args:
        source: the data set.
        limit: the first so many rows only, of a stream.

    Raises:
        SourceError: no such data set, configuration, split or column; duplicate ids.
    """
    try:
        dataset = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # datasets and the hub raise dozens of kinds
        raise SourceError(
            [f"hub data set {_name(source)}: {remedy(error) or f'{type(error).__name__}: {error}'}"]
        ) from error
    if limit is not None:
        dataset = dataset.take(limit)
    found = dataset.column_names or list(next(iter(dataset), {}))
    audio_column, text_column = pick_columns(_name(source), found, source.audio_column, source.text_column)
    dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
    if source.streaming:
        return _stream(source, dataset, audio_column, text_column)
    return _local(source, dataset, audio_column, text_column)


def _local(source: HubSource, dataset: datasets.Dataset, audio_column: str, text_column: str) -> Listing:
    """A data set on this machine: every row can be read by any worker."""
    wanted = {audio_column, text_column, *ID_COLUMNS, *_NAME_COLUMNS}
    light = dataset.select_columns([name for name in dataset.column_names if name in wanted]).with_format("arrow")
    pieces: list[pa.Table] = []
    for part in light.iter(batch_size=_LIST_ROWS):
        first = len(pieces) * _LIST_ROWS
        columns = describe(part, audio_column, text_column, _name(source))
        columns["source"] = pa.array(
            [f"{_name(source)}[{row}]" for row in range(first, first + part.num_rows)], pa.large_string()
        )
        pieces.append(pa.table(columns))
    if not pieces:
        raise SourceError([f"hub data set {_name(source)}: no rows"])
    table = with_ids(pa.concat_tables(pieces))
    if problems := duplicates(table):
        raise SourceError(problems)
    cells = dataset.select_columns([audio_column]).with_format(None)
    cache = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    roots = tuple(Path(folder) for folder in cache)
    if Path(source.dataset).is_dir():
        roots = (Path(source.dataset).absolute(), *roots)
    return Listing(table=table, audio=lambda _, numbers: (HubAudio(cells, number, roots) for number in numbers))


def _stream(source: HubSource, dataset: datasets.IterableDataset, audio_column: str, text_column: str) -> Listing:
    """A data set that is read as a stream: once for its texts, once for its audio."""
    names = dataset.column_names or [audio_column, text_column]
    own = next((name for name in (*ID_COLUMNS, *_NAME_COLUMNS) if name in names), None)
    light = dataset.select_columns([text_column] + ([own] if own else []))

    def rows() -> Iterator[dict[str, Any]]:
        for number, values in enumerate(light):
            row_id = str(values[own]) if own else str(number)
            yield {"id": row_id, "text": values[text_column], "source": f"{_name(source)}[{number}]"}

    table = make_table(rows())
    if problems := duplicates(table):
        raise SourceError(problems)
    audio = _StreamAudio(dataset.select_columns([text_column, audio_column]), audio_column, text_column)
    return Listing(table=table, audio=audio, random_access=False)


class _StreamAudio:
    """Reads a stream forward, shard by shard; what an interrupted prepare has done already is skipped."""

    def __init__(self, dataset: datasets.IterableDataset, audio_column: str, text_column: str) -> None:
        self._dataset = dataset
        self._columns = audio_column, text_column
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._next = -1  # row that the stream gives next

    def __call__(self, part: pa.Table, numbers: Sequence[int]) -> Iterable[AudioRef]:
        audio_column, text_column = self._columns
        if self._next != numbers[0]:
            self._rows = iter(self._dataset.skip(numbers[0]))
        self._next = numbers[-1] + 1
        texts = part.column("text").to_pylist()
        rows = list(islice(self._rows, len(numbers)))
        if [row[text_column] for row in rows] != texts:
            raise CorpusError("the stream gave other rows than when it was listed; run the same command again")
        return [_fetched(row[audio_column]) for row in rows]


def _fetched(cell: dict[str, Any] | None) -> AudioRef:
    """Audio of a stream's row, in memory."""
    if cell and cell.get("bytes") is not None:
        return BytesAudio(cell["bytes"])
    if not cell or not cell.get("path"):
        return NoAudio("neither bytes nor a path")
    try:
        with xopen(cell["path"], "rb") as stream:
            return BytesAudio(stream.read())
    except OSError as error:
        return NoAudio(f"{cell['path']}: {error}")


def _name(source: HubSource) -> str:
    return "/".join(part for part in (source.dataset, source.config, source.split) if part)


def describe_hub(name: str, config: str | None) -> tuple[list[str], list[str]]:
    """Configurations of a hub data set, and the splits of the one that is named or the only one.

    Raises:
        SourceError: it is not there, may not be read, or the hub cannot be reached.
    """
    try:
        if not (Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}").is_dir():
            HfApi().dataset_info(name, timeout=_TIMEOUT_S)  # fails at once, where `datasets` would try again and again
        configs = list(datasets.get_dataset_config_names(name))
        if config is None and len(configs) > 1:
            return configs, []
        return configs, list(datasets.get_dataset_split_names(name, config))
    except Exception as error:  # datasets and the hub raise dozens of kinds
        why = remedy(error) or f"{type(error).__name__}: {error}"
        raise SourceError([f"hub data set {name}: {why}; nor is there a folder {name} here"]) from error
