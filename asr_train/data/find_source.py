"""What a path or name is that somebody calls their data: which kind of source, and which splits it has."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from asr_train.config import DemoSource, FolderSource, HubSource, TableSource
from asr_train.data.folders import AUDIO_SUFFIXES, has_audio
from asr_train.data.rows import SourceError
from asr_train.data.sources import AnySource

_KINDS: Final[dict[str, Literal["parquet", "arrow", "csv", "tsv", "jsonl"]]] = {
    ".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl", ".json": "jsonl", ".tsv": "tsv", ".csv": "csv",
}  # fmt: skip
_EVALUATION: Final = {"dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "eval": "dev", "test": "test"}
_ON_HUB: Final = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_HINT: Final = "a data set on the hub is written OWNER/NAME or OWNER/NAME:CONFIG"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What somebody's data is.

    Attributes:
        what: in words.
        train: sources of the training set.
        sets: evaluation sets that the data itself has, by name.
    """

    what: str
    train: tuple[AnySource, ...]
    sets: dict[str, AnySource]


def find_source(data: str, *, audio_column: str | None = None, text_column: str | None = None) -> Found:
    """Tell what kind of source some data is.

    Args:
        data: a file, a folder, a pattern, or a name on the hub.
        audio_column: of a table or a hub data set; found by its name when None.
        text_column: likewise.

    Raises:
        SourceError: there is no such thing, or nothing in it that could be speech.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        found = _folder(path.absolute())
    elif path.is_file() or any(character in data for character in "*?["):
        found = _table(path.absolute())
    elif (name := _ON_HUB.fullmatch(data)) is not None:
        found = _hub(name[1], name[2])
    else:
        raise SourceError([f"{data}: no such file or folder; {_HINT}"])
    given = {"audio_column": audio_column, "text_column": text_column}
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(
        found,
        train=tuple(_changed(source, changes) for source in found.train),
        sets={name: _changed(source, changes) for name, source in found.sets.items()},
    )


def _changed(source: AnySource, changes: dict[str, Any]) -> AnySource:
    return replace(source, **changes) if changes and isinstance(source, TableSource | HubSource) else source


def _table(path: Path) -> Found:
    """A table, with its siblings for evaluation: dev.csv beside train.csv."""
    kind = _KINDS.get(path.suffix)
    if kind is None and path.suffix.lower() in AUDIO_SUFFIXES:
        raise SourceError([f"{path}: one recording is no data set; give its folder, or a table that names recordings"])
    if kind is None:
        raise SourceError([f"{path}: no table that is known here: {', '.join(_KINDS)}"])
    sets: dict[str, AnySource] = {}
    if "train" in path.name:
        for word, name in _EVALUATION.items():
            beside = path.with_name(path.name.replace("train", word))
            if beside.is_file():
                sets.setdefault(name, TableSource(kind=kind, path=str(beside)))
    return Found(what=f"a {kind} table", train=(TableSource(kind=kind, path=str(path)),), sets=sets)


def _folder(path: Path) -> Found:
    """The first that fits: a known tree, a folder with a table of its own, split folders, tables, audio files."""
    looks = (_common_voice, _librispeech, _with_metadata, _split_folders, _tables, _recordings)
    for look in looks:
        if (found := look(path)) is not None:
            return found
    raise SourceError(
        [
            f"{path}: neither audio files nor a table in it; expected audio files with .txt files beside them, a table "
            f"({', '.join(_KINDS)}), or the tree of LibriSpeech or Common Voice"
        ]
    )


def _common_voice(path: Path) -> Found | None:
    """clips/ and train.tsv, here or one or two folders down: cv-corpus-17.0/tr."""
    roots = [root for root in _levels(path, 2) if (root / "clips").is_dir() and _has_speakers(root)]
    if not roots:
        return None
    if len(roots) > 1:
        listed = ", ".join(str(root.relative_to(path)) for root in roots)
        raise SourceError([f"{path}: several Common Voice trees in it; name one of: {listed}"])
    splits = {table.stem for table in roots[0].glob("*.tsv")}
    train = next((split for split in ("train", "validated") if split in splits), None)
    if train is None:
        raise SourceError([f"{roots[0]}: Common Voice without train.tsv; it has: {', '.join(sorted(splits))}"])

    def source(split: str) -> AnySource:
        return FolderSource(kind="common_voice", path=str(roots[0]), split=split)

    others = [] if train == "validated" else [split for split in ("dev", "test") if split in splits]
    return Found(what="Common Voice's tree", train=(source(train),), sets={split: source(split) for split in others})


def _has_speakers(root: Path) -> bool:
    """Whether the tables are Common Voice's, whose first column is client_id, and no others beside a folder clips/."""
    for table in root.glob("*.tsv"):
        with table.open(encoding="utf-8-sig", errors="replace") as stream:
            if stream.readline().split("\t")[0] == "client_id":
                return True
    return False


def _librispeech(path: Path) -> Found | None:
    """Folders SPLIT/SPEAKER/CHAPTER with *.trans.txt; the folder itself may be a split."""
    if next(path.glob("*/*/*.trans.txt"), None) is not None:
        path, splits = path.parent, [path.name]
    else:
        root = path / "LibriSpeech" if (path / "LibriSpeech").is_dir() else path
        splits = [
            child.name for child in _folders(root) if next(child.glob("*/*/*.trans.txt"), None) is not None
        ]  # fmt: skip
    if not splits:
        return None

    def source(split: str) -> AnySource:
        return FolderSource(kind="librispeech", path=str(path), split=split)

    train = [split for split in splits if split.startswith("train")] or splits[:1]
    rest = [split for split in splits if split not in train]
    chosen = [split for split in rest if split.startswith("dev")] or rest
    return Found(
        what="LibriSpeech's tree",
        train=tuple(map(source, train)),
        sets={split.replace("-", "_"): source(split) for split in chosen},
    )


def _with_metadata(path: Path) -> Found | None:
    if not any((path / f"metadata.{kind}").is_file() for kind in ("csv", "jsonl")):
        return None
    source = FolderSource(kind="audio_folder", path=str(path))
    return Found(what="a folder of audio files with a metadata table", train=(source,), sets={})


def _split_folders(path: Path) -> Found | None:
    """train/ with dev/ or test/ beside it, each of the same kind."""
    if not (path / "train").is_dir():
        return None
    found = _folder(path / "train")
    if len(found.train) != 1 or found.sets or isinstance(found.train[0], HubSource | DemoSource):
        return found
    sets: dict[str, AnySource] = {}
    for word, name in _EVALUATION.items():
        if (path / word).is_dir():
            sets.setdefault(name, replace(found.train[0], path=str(path / word)))
    return replace(found, what=f"{found.what}, in folders for its splits", sets=sets)


def _tables(path: Path) -> Found | None:
    """Tables in the folder, or in data/ as on the hub: train-*.parquet, train.csv, or all of one kind together."""
    for folder in (path, path / "data"):
        for suffix, kind in _KINDS.items():
            tables = [table for table in sorted(folder.glob(f"*{suffix}")) if _is_data(table, folder)]
            if not tables:
                continue
            train = [table for table in tables if "train" in table.name]
            if len(tables) == 1 or len(train) == 1:
                return _table((train or tables)[0])
            if train and all(re.match(r"\w+-\d", table.name) for table in tables):  # train-00000-of-00005.parquet
                names = {_EVALUATION[word]: word for table in tables
                         if (word := table.name.partition("-")[0]) in _EVALUATION}  # fmt: skip
                return Found(
                    what=f"{kind} tables",
                    train=(TableSource(kind=kind, path=str(folder / f"train-*{suffix}")),),
                    sets={name: TableSource(kind=kind, path=str(folder / f"{word}-*{suffix}"))
                          for name, word in names.items()},
                )  # fmt: skip
            return Found(what=f"{kind} tables", train=(TableSource(kind=kind, path=str(folder)),), sets={})
    return None


def _is_data(table: Path, folder: Path) -> bool:
    """Whether a file is a table of utterances; `datasets` writes notes as .json beside its own."""
    return table.suffix != ".json" or not any(folder.glob("*.arrow"))


def _recordings(path: Path) -> Found | None:
    if not has_audio(path):
        return None
    source = FolderSource(kind="audio_folder", path=str(path))
    return Found(what="a folder of audio files, their texts beside them", train=(source,), sets={})


def _hub(name: str, config: str | None) -> Found:
    """A data set on the hub: its configurations and splits are asked for.

    Raises:
        SourceError: it is not there, may not be read, or the hub cannot be reached; several configurations.
    """
    from asr_train.data.hub import describe_hub  # noqa: PLC0415 - datasets imports torch, which takes seconds

    configs, splits = describe_hub(name, config)
    if config is None and len(configs) > 1:
        listed = ", ".join(configs[:30]) + (", ..." if len(configs) > 30 else "")
        raise SourceError([f"{name} on the hub has several configurations; name one as {name}:CONFIG of: {listed}"])
    train = next((split for split in splits if split.startswith("train")), splits[0] if splits else "train")

    def source(split: str) -> AnySource:
        return HubSource(kind="hub", dataset=name, config=config, split=split)

    sets: dict[str, AnySource] = {}
    for split in splits:
        if split != train and (word := re.split(r"[._-]", split)[0]) in _EVALUATION:
            sets.setdefault(_EVALUATION[word], source(split))
    return Found(what="a data set on the hub", train=(source(train),), sets=sets)


def _levels(path: Path, depth: int) -> Iterator[Path]:
    """The folder itself, then those in it, down to a depth."""
    level: Sequence[Path] = [path]
    for _ in range(depth + 1):
        yield from level
        level = [child for folder in level for child in _folders(folder)]


def _folders(path: Path) -> list[Path]:
    """Folders in a folder; among a million recordings too, none of which is asked what it is."""
    with os.scandir(path) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())
