"""`python -m asr_train.prepare RECIPE [k=v]`: any source of speech -> a corpus that training maps into memory.

Work is cut into shards, each written aside and renamed: a prepare that was killed goes on where it was, two that run
at once do not disturb each other, and a finished one is found again by the hash of what made it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import asr_train
from asr_train.config import Recipe
from asr_train.data import summary as report
from asr_train.data.corpus import (
    Corpus,
    corpus_identity,
    corpus_path,
    read_batches,
    set_names,
    shard_path,
)
from asr_train.data.rows import Listing, SourceError
from asr_train.data.shards import RowChecks, end_with_parent, rejected_path, write_shard
from asr_train.data.sources import open_sources
from asr_train.data.text import Normaliser, Vocabulary, collision_message
from asr_train.errors import EXIT_DONE, CorpusError, RecipeError, run_main
from asr_train.files import atomic_file, hash_json, read_json, read_jsonl, write_json, write_text
from asr_train.geometry import SAMPLE_RATE, FrameGeometry
from asr_train.lock import HeartbeatLock, LockHeldError
from asr_train.recipe import load_recipe

_POLL_S = 0.5  # between two looks at another process's lock
_TEXTS_SHOWN = 6
_MISMATCH_SHARE = 0.5  # of training characters unknown to a given vocabulary: another case or another script


@dataclass(frozen=True)
class _Shard:
    """One piece of work: rows start..stop of a listing, which is part of a set."""

    set: str
    number: int
    first_row: int  # of the set
    listing: Listing
    start: int
    stop: int


def prepare(recipe: Recipe, *, progress: bool = True) -> Corpus:
    """Prepare the corpus of a recipe; at once where it is done already, and only the rest where it was interrupted.

    Args:
        recipe: the resolved recipe.
        progress: show a progress bar, or lines where there is no terminal, and the report at the end.

    Raises:
        SourceError: bad input, all of it, with file and row.
        CorpusError: too many refused rows, an empty set, a vocabulary that does not fit.
        RecipeError: names of sets that a corpus cannot have.
    """
    _check_names(recipe)
    geometry = _geometry(recipe)
    path = corpus_path(recipe, geometry)
    waited_for: Any = None
    while not (path / "corpus.json").exists():
        try:
            with HeartbeatLock(path / "lock.json"):
                if not (path / "corpus.json").exists():
                    _make(recipe, geometry, path, progress)
        except LockHeldError as held:
            if waited_for != held.holder:
                waited_for = held.holder
                who = f"process {held.holder.get('pid')} on {held.holder.get('host')}"
                print(f"waiting for {who}, which prepares {path}", file=sys.stderr, flush=True)
            time.sleep(_POLL_S)
    corpus = Corpus.open(path)
    _check_counts(corpus.info["sets"], recipe, path)
    return corpus


def is_prepared(recipe: Recipe) -> Path | None:
    """The recipe's corpus, if it is complete."""
    path = corpus_path(recipe, _geometry(recipe))
    return path if (path / "corpus.json").exists() else None


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="prepare", description="Prepare the corpus of a recipe.")
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    done = is_prepared(recipe)
    corpus = prepare(recipe)
    changed = _changed_files(corpus.info) if done else []
    if changed:
        listed = "".join(f"\n  {name}" for name in changed)
        raise CorpusError(
            f"{corpus.path} was prepared from files that have changed since:{listed}\n"
            "delete that folder to prepare it anew; it was left as it is"
        )
    rows = ", ".join(f"{name} {entry['rows']:,} rows" for name, entry in corpus.info["sets"].items())
    print(f"{'already prepared' if done else 'prepared'}: {corpus.path} ({rows})")
    return EXIT_DONE


# --- the stages -------------------------------------------------------------------------------------------------


def _make(recipe: Recipe, geometry: FrameGeometry, path: Path, progress: bool) -> None:
    """Prepare what is missing of a corpus, under its lock."""
    # 1. List every source; nothing is decoded yet.
    listings = _list_sources(recipe)
    # 2. The vocabulary: from the training texts, or a given processor.
    vocabulary, unknown = _vocabulary(recipe, listings["train"])
    _begin(path, listings, vocabulary)
    # 3. Shards, in parallel; those of an interrupted prepare are kept.
    shards = list(_shards(recipe, listings))
    missing = [shard for shard in shards if not shard_path(path / shard.set, shard.number).exists()]
    _write_shards(recipe, path, missing, _checks(recipe, geometry, vocabulary), progress)
    # 4. Lengths, counts, refused rows, the report.
    sets = {name: _finish_set(path, name, [s.number for s in shards if s.set == name]) for name in listings}
    _write_rejected(path, shards)
    summary = _write_summary(path, sets, vocabulary, unknown)
    if progress:
        Console().print(report.render(summary), markup=False, highlight=False)
    _check_counts(sets, recipe, path)
    # 5. What transformers reads, then the file that makes it a corpus.
    _save_processor(recipe, vocabulary, path)
    identity = corpus_identity(recipe, geometry)
    info = {
        "format": identity["format"],
        "hash": hash_json(identity),
        "identity": identity,
        "sets": sets,
        "vocabulary": vocabulary.to_json(),
        "files": _file_stamps(listing for group in listings.values() for listing in group),
        "versions": _versions(),
    }
    write_json(path / "corpus.json", info)
    for shard in shards:
        rejected_path(path / shard.set, shard.number).unlink(missing_ok=True)
    (path / "listing.json").unlink(missing_ok=True)


def _check_names(recipe: Recipe) -> None:
    taken = [name for name in recipe.eval.sets if name in ("train", "processor")]
    if taken:
        raise RecipeError(f"eval.sets.{taken[0]}: a corpus has a folder of that name already; choose another")


def _geometry(recipe: Recipe) -> FrameGeometry:
    from asr_train.model_config import frame_geometry, load_model_config  # noqa: PLC0415 - transformers takes seconds

    return frame_geometry(load_model_config(recipe.model, recipe.trust_remote_code))


def _list_sources(recipe: Recipe) -> dict[str, list[Listing]]:
    """The rows of every set, listed."""
    listings, problems = {}, []
    for name in set_names(recipe):
        sources = recipe.data.train if name == "train" else recipe.eval.sets[name]
        try:
            listings[name] = open_sources(sources)
        except SourceError as error:
            problems += error.problems
    if problems:
        raise SourceError(problems)
    return listings


def _vocabulary(recipe: Recipe, train: Sequence[Listing]) -> tuple[Vocabulary, dict[str, int]]:
    """The vocabulary, and how often each training character that it lacks occurs.

    Raises:
        CorpusError: texts that collide with special tokens; a given vocabulary that most characters are not in.
    """
    normalise = Normaliser(recipe.text)
    counts: Counter[str] = Counter()

    def texts() -> Iterator[str]:
        for listing in train:
            for text in listing.texts():
                if text:
                    normalised = normalise(text)
                    counts.update(normalised)
                    yield normalised

    if recipe.text.processor is None:
        vocabulary = Vocabulary.build(texts())
        return vocabulary, {}
    vocabulary = _given_vocabulary(recipe)
    collisions: dict[str, str] = {}
    for text in texts():
        for token in vocabulary.collisions(text):
            collisions.setdefault(token, text)
    if collisions:
        raise CorpusError(collision_message(collisions))
    unknown = report.unknown_counts(counts, vocabulary)
    share = sum(unknown.values()) / max(1, sum(counts.values()))
    if share > _MISMATCH_SHARE:
        raise CorpusError(
            f"text.processor: {recipe.text.processor!r} lacks {100 * share:.0f} % of the characters of the training "
            f"texts ({' '.join(map(report.shown, islice(unknown, 12)))} ...); it has: "
            f"{' '.join(map(report.shown, vocabulary.tokens[:40]))}. Is text.case: {recipe.text.case} right?"
        )
    return vocabulary, unknown


def _given_vocabulary(recipe: Recipe) -> Vocabulary:
    """The vocabulary of `text.processor`: a folder, or a name on the hub."""
    from asr_train.model_config import load_vocabulary  # noqa: PLC0415 - transformers takes seconds

    assert recipe.text.processor is not None
    vocabulary = load_vocabulary(recipe.text.processor)
    if recipe.text.unknown_characters in (None, "unk") and vocabulary.unk is None:
        raise CorpusError(
            f"text.processor: {recipe.text.processor!r} has no unknown token; set text.unknown_characters to reject "
            "or remove"
        )
    return vocabulary


def _begin(path: Path, listings: dict[str, list[Listing]], vocabulary: Vocabulary) -> None:
    """Note what the shards are made from; shards of an interrupted prepare are kept only if they agree."""
    noted = {
        "listings": {name: [listing.digest() for listing in group] for name, group in listings.items()},
        "vocabulary": vocabulary.to_json(),
    }
    note = path / "listing.json"
    if not note.exists() or read_json(note) != noted:
        for name in listings:
            shutil.rmtree(path / name, ignore_errors=True)
        write_json(note, noted)
    for leftover in path.glob("*/.*.tmp"):  # of a worker that was killed
        leftover.unlink(missing_ok=True)


def _shards(recipe: Recipe, listings: dict[str, list[Listing]]) -> Iterator[_Shard]:
    """The work, cut into pieces of `shard_rows`; always the same pieces."""
    for name, group in listings.items():
        number = first_row = 0
        for listing in group:
            for start in range(0, len(listing), recipe.data.shard_rows):
                stop = min(start + recipe.data.shard_rows, len(listing))
                yield _Shard(name, number, first_row + start, listing, start, stop)
                number += 1
            first_row += len(listing)


def _checks(recipe: Recipe, geometry: FrameGeometry, vocabulary: Vocabulary) -> Callable[[str], RowChecks]:
    """The checks of a set, by its name."""
    default: Literal["reject", "unk"] = "reject" if recipe.text.processor is None else "unk"

    def checks(set_name: str) -> RowChecks:
        return RowChecks(
            training=set_name == "train",
            text=recipe.text,
            vocabulary=vocabulary,
            unknown_characters=recipe.text.unknown_characters or default,
            geometry=geometry,
            min_duration_s=recipe.data.min_duration_s,
            max_duration_s=recipe.data.max_duration_s,
            encoding=recipe.data.encoding,
        )

    return checks


def _write_shards(
    recipe: Recipe, path: Path, shards: Sequence[_Shard], checks: Callable[[str], RowChecks], progress: bool
) -> None:
    """Write shards, in this process or in `num_proc` others."""
    for name in {shard.set for shard in shards}:
        (path / name).mkdir(parents=True, exist_ok=True)

    def work(shard: _Shard) -> tuple[Any, ...]:
        rows = shard.listing.rows(shard.start, shard.stop)
        return path / shard.set, shard.number, shard.first_row, rows, checks(shard.set)

    num_rows = sum(shard.stop - shard.start for shard in shards)
    num_proc = min(recipe.data.num_proc, len(shards))
    with _Bar(num_rows, progress) as bar:
        if num_proc <= 1:
            for shard in shards:
                bar.advance(write_shard(*work(shard)))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_proc, context, end_with_parent, (os.getpid(),)) as pool:
            try:
                for count in _in_flight(pool, map(work, shards), num_proc + 1):
                    bar.advance(count)
            except BrokenProcessPool:
                raise CorpusError(
                    f"a worker process of prepare was killed, by the system for memory perhaps; what is done is kept "
                    f"in {path}: run the same command again, with a smaller data.num_proc or data.shard_rows"
                ) from None


def _in_flight(pool: ProcessPoolExecutor, work: Iterator[tuple[Any, ...]], most: int) -> Iterator[int]:
    """Run `write_shard` on work items, a few at a time so that few rows are in memory; yields counts of rows."""
    running: set[Future[int]] = {pool.submit(write_shard, *item) for item in islice(work, most)}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)
        running |= {pool.submit(write_shard, *item) for item in islice(work, len(done))}


class _Bar:
    """Rows done: a bar on a terminal, a line every ten seconds elsewhere, nothing when not asked for."""

    def __init__(self, num_rows: int, shown: bool) -> None:
        self._total, self._done, self._shown = num_rows, 0, shown and num_rows > 0
        self._said_at = time.monotonic()
        columns = (TextColumn("prepare"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
        self._progress = Progress(*columns, disable=not (self._shown and sys.stdout.isatty()))
        self._task = self._progress.add_task("prepare", total=num_rows)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self._done += count
        self._progress.advance(self._task, count)
        if self._shown and self._progress.disable and time.monotonic() - self._said_at >= 10:
            self._said_at = time.monotonic()
            print(f"prepare: {self._done:,} of {self._total:,} rows", flush=True)


# --- finishing --------------------------------------------------------------------------------------------------


def _finish_set(path: Path, name: str, numbers: Sequence[int]) -> dict[str, Any]:
    """Write a set's lengths and index; what corpus.json says of the set."""
    folder = path / name
    samples, labels, shard_rows = [], [], []
    texts: list[tuple[str, str]] = []
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number in numbers:
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
    _save_index(folder, num_samples)
    return {
        "rows": len(num_samples),
        "hours": float(num_samples.sum()) / SAMPLE_RATE / 3600,
        "rejected": dict(reasons.most_common()),
        "examples": examples,
        "texts": texts[:_TEXTS_SHOWN],
    }


def _changed_texts(batch: Any) -> list[tuple[str, str]]:
    """A few texts before and after normalisation, changed ones first."""
    columns = (batch.column(name).slice(0, 200).to_pylist() for name in ("raw_text", "text"))
    pairs = list(zip(*columns, strict=True))
    return sorted(pairs, key=lambda pair: pair[0] == pair[1])[:_TEXTS_SHOWN]


def _save(path: Path, parts: Sequence[Any]) -> Any:
    array = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    with atomic_file(path) as stream:
        np.save(stream, array)
    return array


def _save_index(folder: Path, num_samples: Any) -> None:
    """The plan's index of lengths."""
    try:
        from asr_train.data.plan import LengthIndex  # noqa: PLC0415
    except ImportError:
        return
    if len(num_samples):
        LengthIndex.build(num_samples).save(folder / "index")


def _write_rejected(path: Path, shards: Sequence[_Shard]) -> None:
    """All refused rows, in the order of sets and rows."""
    with atomic_file(path / "rejected.jsonl", "w") as stream:
        for shard in shards:
            for entry in read_jsonl(rejected_path(path / shard.set, shard.number)):
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_summary(
    path: Path, sets: dict[str, dict[str, Any]], vocabulary: Vocabulary, unknown: dict[str, int]
) -> dict[str, Any]:
    """Write summary.json and summary.txt."""
    summary = {
        "sets": sets,
        "vocabulary": vocabulary.to_json(),
        "unknown_characters": unknown,
        "texts": sets["train"]["texts"],
    }
    write_json(path / "summary.json", summary)
    write_text(path / "summary.txt", report.render(summary))
    return summary


def _check_counts(sets: dict[str, dict[str, Any]], recipe: Recipe, path: Path) -> None:
    """Refuse a corpus that refused too much."""
    problems = []
    for name, entry in sets.items():
        refused = sum(entry["rejected"].values())
        percent = 100 * refused / max(1, entry["rows"] + refused)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in entry["rejected"].items())
        if percent > recipe.data.max_rejected_percent:
            problems.append(f"set {name}: {refused:,} of {entry['rows'] + refused:,} rows ({percent:.1f} %): {reasons}")
        elif not entry["rows"]:
            problems.append(f"set {name}: no rows are left{': ' if reasons else ''}{reasons}")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise CorpusError(
            f"more rows were refused than data.max_rejected_percent={recipe.data.max_rejected_percent:g} allows:"
            f"{listed}\nevery refused row is in {path / 'rejected.jsonl'}; mend the data, or raise that limit and run the same "
            "command again: what is done is kept"
        )


def _save_processor(recipe: Recipe, vocabulary: Vocabulary, path: Path) -> None:
    from asr_train.model_config import build_processor, feature_extractor, load_model_config  # noqa: PLC0415

    config = load_model_config(recipe.model, recipe.trust_remote_code)
    build_processor(vocabulary, feature_extractor(recipe.model, config)).save_pretrained(path / "processor")


def _file_stamps(listings: Iterator[Listing]) -> dict[str, list[int]]:
    """Size and time of change of the files that tables were read from."""
    return {str(file): _stamp(file) for listing in listings for file in listing.files}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _changed_files(info: dict[str, Any]) -> list[str]:
    """Tables that are no longer as they were when the corpus was prepared; those that are gone don't count."""
    stamps = info["files"].items()
    return [name for name, stamp in stamps if Path(name).exists() and _stamp(Path(name)) != stamp]


def _versions() -> dict[str, str]:
    return {
        "wavefleet": asr_train.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "soundfile": soundfile.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "soxr": soxr.__version__,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
