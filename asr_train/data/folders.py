"""Folder trees of audio files: texts beside them, LibriSpeech's tree, Common Voice's tree."""

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from asr_train.config import FolderSource, TableSource
from asr_train.data.manifests import FILE_COLUMNS, file_references, open_manifest
from asr_train.data.rows import Listing, SourceError, duplicates, make_table

# m4a and the like are listed too: libsndfile cannot read them, so they show up as refused rows instead of vanishing
AUDIO_SUFFIXES = frozenset(
    (
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".oga",
        ".opus",
        ".aif",
        ".aiff",
        ".au",
        ".caf",
        ".w64",
        ".m4a",
        ".aac",
        ".wma",
        ".webm",
        ".mp4",
    )
)


def open_folder(source: FolderSource) -> Listing:
    """List the rows of a folder tree.

    Raises:
        SourceError: no such folder or split, no audio in it, lines that are no rows, duplicate ids.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        raise SourceError([f"{folder}: no such folder"])
    match source.kind:
        case "audio_folder":
            return _audio_folder(source, folder)
        case "librispeech":
            return _librispeech(source, folder)
        case "common_voice":
            return _common_voice(source, folder)


def _audio_folder(source: FolderSource, folder: Path) -> Listing:
    """metadata.csv or metadata.jsonl, as Hugging Face's AudioFolder has it; else NAME.txt beside NAME.wav."""
    if source.split is not None:
        raise SourceError([f"{folder}: an audio_folder has no split {source.split!r}; give that folder as path"])
    tables: tuple[Literal["csv", "jsonl"], ...] = ("csv", "jsonl")
    for kind in tables:
        if (folder / f"metadata.{kind}").is_file():
            return open_manifest(_table(source, kind, folder / f"metadata.{kind}"))
    table = make_table(_texts_beside(folder), FILE_COLUMNS)
    if not table.num_rows:
        raise SourceError([f"{folder}: no audio files, and no metadata.csv or metadata.jsonl"])
    if problems := duplicates(table):
        raise SourceError(problems)
    return Listing(table=table, audio=file_references)


def has_audio(folder: Path) -> bool:
    """Whether there is an audio file anywhere in a folder."""
    return any(_is_audio(path.name) for path in _walk(folder))


def _texts_beside(folder: Path) -> Iterator[dict[str, Any]]:
    """Every audio file of a tree, with the text of the .txt file of its name; without one `prepare` refuses it."""
    for path in _walk(folder):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            beside = path.with_suffix(".txt")
            text = beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else None
            yield _row(str(path.relative_to(folder)), text, str(path), path)


def _librispeech(source: FolderSource, folder: Path) -> Listing:
    """SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID TEXT`, and ID.flac beside it."""
    split = source.split or ""
    root = next((root for root in (folder / split, folder / "LibriSpeech" / split) if root.is_dir()), None)
    if root is None:
        inner = folder / "LibriSpeech" if (folder / "LibriSpeech").is_dir() else folder
        known = ", ".join(sorted(path.name for path in inner.iterdir() if path.is_dir())) or "no folders"
        raise SourceError([f"{inner}: split {split!r} is not there; it has: {known}"])
    problems: list[str] = []
    table = make_table(_transcripts(root, problems), FILE_COLUMNS)
    if not table.num_rows and not problems:
        problems.append(f"{root}: no *.trans.txt below it")
    if problems or (problems := duplicates(table)):
        raise SourceError(problems)
    return Listing(table=table, audio=file_references)


def _transcripts(root: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    for path in _walk(root):
        if not path.name.endswith(".trans.txt"):
            continue
        beside = {name.rpartition(".")[0]: name for name in sorted(os.listdir(path.parent)) if _is_audio(name)}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            problems.append(f"{path}: not UTF-8 text: {error}")
            continue
        for number, line in enumerate(lines, 1):
            row_id, _, text = line.strip().partition(" ")
            if row_id:
                audio = path.parent / beside.get(row_id, f"{row_id}.flac")
                yield _row(row_id, text, f"{path}:{number}", audio)


def _common_voice(source: FolderSource, folder: Path) -> Listing:
    """SPLIT.tsv with the columns path and sentence, and the folder clips."""
    table = folder / f"{source.split}.tsv"
    if source.split is None or not table.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.tsv"))) or "no .tsv file"
        raise SourceError([f"{folder}: split {source.split!r} is not there; it has: {known}"])
    return open_manifest(
        _table(source, "tsv", table, audio_root=str(folder / "clips"), audio_column="path", text_column="sentence")
    )


def _table(source: FolderSource, kind: Literal["csv", "jsonl", "tsv"], path: Path, **changes: Any) -> TableSource:
    """A table inside a folder, with the folder's random split."""
    own = {field.name for field in fields(FolderSource)} - {"kind", "path", "split"}
    return TableSource(kind=kind, path=str(path), **{name: getattr(source, name) for name in own}, **changes)


def _row(row_id: str, text: str | None, source: str, path: Path) -> dict[str, Any]:
    nothing = {"offset_s": None, "duration_s": None}
    return {"id": row_id, "text": text, "source": source, "path": str(path), **nothing}


def _is_audio(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES  # noqa: PTH122 - names, not paths


def _walk(root: Path) -> Iterator[Path]:
    """All files of a tree, sorted. Links to folders are followed; a folder that was seen is not entered again."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files))
