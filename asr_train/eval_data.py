"""What `--data` names: the sets of a recipe, or one table or folder, as sets that can be scored."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_train.config import FolderSource, Recipe, TableSource, TextSettings
from asr_train.data.corpus import CorpusSet
from asr_train.data.finish import finish_set
from asr_train.data.shard_pool import cut, write_shards
from asr_train.data.shards import RowChecks
from asr_train.data.sources import open_sources
from asr_train.data.text import Vocabulary
from asr_train.errors import CorpusError, RecipeError
from asr_train.files import write_json
from asr_train.geometry import FrameGeometry
from asr_train.recipe import load_recipe

_TABLES = ("jsonl", "csv", "tsv", "parquet", "arrow")
_SHARD_ROWS = 1000


@dataclass(frozen=True)
class DataName:
    """What a `--data` argument means: exactly one of the two."""

    recipe: Recipe | None
    source: TableSource | FolderSource | None
    set_name: str = "data"  # of a source


def read_data_name(data: str) -> DataName:
    """Tell a recipe from a table and from a folder.

    Raises:
        RecipeError: it is none of them; lists the shipped recipes.
    """
    path = Path(data).expanduser()
    kind: Any = path.suffix.removeprefix(".")
    if path.is_dir():
        return DataName(None, FolderSource(kind="audio_folder", path=str(path.absolute())), path.absolute().name)
    if kind in _TABLES:
        return DataName(None, TableSource(kind=kind, path=str(path.absolute())), path.stem)
    return DataName(load_recipe(data), None)


def pick_sets(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The sets asked for; all when none is.

    Raises:
        RecipeError: an unknown set, or none at all.
    """
    if not known:
        raise RecipeError("the recipe has no eval.sets; name others with --data")
    if unknown := [name for name in wanted if name not in known]:
        raise RecipeError(f"--set {', '.join(unknown)}: no such set; the recipe has: {', '.join(known)}")
    return list(wanted or known)


def prepare_source(
    source: TableSource | FolderSource,
    folder: Path,
    *,
    text: TextSettings,
    vocabulary: Vocabulary,
    geometry: FrameGeometry,
    progress: bool,
) -> CorpusSet:
    """Decode a table or folder into `folder` as an evaluation set: rows without audio or reference are refused.

    Raises:
        CorpusError: the source cannot be read, or no row of it can be used.
    """
    name = "data"
    checks = _evaluation_checks(text, vocabulary, geometry)
    shards = cut({name: open_sources([source])}, _SHARD_ROWS)
    write_shards(folder, shards, lambda _: checks, os.cpu_count() or 1, progress)
    info = finish_set(folder / name, len(shards))
    write_json(folder / "corpus.json", {"sets": {name: info}})  # what CorpusSet.num_refused reads
    if not info["rows"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in info["rejected"].items()) or "it has no rows"
        raise CorpusError(f"{source.path}: no row can be scored: {reasons}")
    return CorpusSet(folder / name)


def _evaluation_checks(text: TextSettings, vocabulary: Vocabulary, geometry: FrameGeometry) -> RowChecks:
    return RowChecks(
        training=False,
        text=text,
        vocabulary=vocabulary,
        unknown_characters="reject",  # of training rows; evaluation rows are kept, without labels
        geometry=geometry,
        min_duration_s=0.0,
        max_duration_s=float("inf"),
        encoding="pcm16",
    )
