"""`python -m asr_train.prepare RECIPE [k=v]`: any source of speech -> a corpus that training maps into memory.

Work is cut into shards, each written aside and renamed: a prepare that was killed goes on where it was, two that run
at once do not disturb each other, and a finished one is found again by the hash of what made it.
"""

import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
from rich.console import Console

import asr_train
from asr_train.arguments import prepare_parser
from asr_train.config import Recipe
from asr_train.data import summary as report
from asr_train.data.corpus import (
    Corpus,
    corpus_identity,
    corpus_path,
    set_names,
    shard_path,
)
from asr_train.data.finish import check_counts, finish_set, write_rejected
from asr_train.data.rows import Listing, SourceError
from asr_train.data.shard_pool import Shard, cut, write_shards
from asr_train.data.shards import RowChecks, mended_shards, rejected_path
from asr_train.data.sources import open_sources
from asr_train.data.text import Normaliser, Vocabulary, collision_message
from asr_train.disk import is_full, no_room
from asr_train.errors import EXIT_DONE, CorpusError, RecipeError, run_main, say
from asr_train.files import hash_json, read_json, write_json, write_text
from asr_train.geometry import FrameGeometry
from asr_train.lock import HeartbeatLock, LockHeldError, holder
from asr_train.recipe import load_recipe
from asr_train.verbosity import is_quiet

NOTE = "listing.json"  # in a corpus that is not complete: what its shards are made from
SHARES = ".shares"  # in a corpus that is not complete: locks of who writes a share of its shards
_POLL_S = 0.5  # between two looks at another process's lock
_MISMATCH_SHARE = 0.5  # of training characters unknown to a given vocabulary: another case or another script


def prepare(recipe: Recipe, *, progress: bool = True) -> Corpus:
    """Prepare the corpus of a recipe; at once where it is done already, and only the rest where it was interrupted.

    Args:
        recipe: the resolved recipe.
        progress: show a progress bar, or lines where there is no terminal, and the report at the end; not with `-q`.

    Raises:
        SourceError: bad input, all of it, with file and row.
        CorpusError: too many refused rows, an empty set, a vocabulary that does not fit.
        RecipeError: names of sets that a corpus cannot have.
    """
    check_names(recipe)
    progress = progress and not is_quiet()
    geometry = corpus_geometry(recipe)
    path = corpus_path(recipe, geometry)
    if changed := _changed_files(path):
        say(f"note: {_stale(path, changed)}; it is used as it is")
    alone(path / "lock.json", path, lambda: _make(recipe, geometry, path, progress))
    corpus = Corpus.open(path)
    check_counts(corpus.info["sets"], recipe.data.max_rejected_percent, path)
    return corpus


def alone(lock: Path, path: Path, work: Callable[[], None]) -> None:
    """Work on a corpus under a lock, unless the corpus is complete; waits for whoever holds the lock, and says so.

    Raises:
        CorpusError: the corpus cannot be written.
    """
    waited_for: Any = None
    while not (path / "corpus.json").exists():
        try:
            with _without_empty(path), HeartbeatLock(lock):
                if not (path / "corpus.json").exists():
                    work()
                return
        except OSError as error:  # a full disk, a folder without permission
            why = no_room(error, path) if is_full(error) else error
            raise CorpusError(f"corpus {path} cannot be written: {why}; what is done is kept") from error
        except LockHeldError as held:
            if waited_for != held.holder:
                waited_for = held.holder
                say(f"waiting for {who(held.holder)}, which prepares {path}")
            time.sleep(_POLL_S)


@contextmanager
def _without_empty(path: Path) -> Iterator[None]:
    """Leave no empty folder behind where nothing came of a corpus, bad input say."""
    is_new_root = not path.parent.exists()
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty, and stays
            path.rmdir()
            if is_new_root:
                path.parent.rmdir()
        raise


def who(held: dict[str, Any]) -> str:
    """A lock's holder in words."""
    return f"process {held.get('pid')} on {held.get('host')}"


def is_prepared(recipe: Recipe) -> Path | None:
    """The recipe's corpus, if it is complete."""
    path = corpus_path(recipe, corpus_geometry(recipe))
    return path if (path / "corpus.json").exists() else None


def wait_for_corpus(recipe: Recipe, poll_s: float = 1.0) -> Corpus:
    """The recipe's corpus, once another process has prepared it; looks at one file, and asks nobody."""
    path = corpus_path(recipe, corpus_geometry(recipe))
    while not (path / "corpus.json").exists():
        time.sleep(poll_s)
    return Corpus.open(path)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    arguments = prepare_parser().parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    done = is_prepared(recipe)
    if done and (changed := _changed_files(done)):
        raise CorpusError(f"{_stale(done, changed)}; it was left as it is")
    corpus = prepare(recipe)
    rows = ", ".join(f"{name} {entry['rows']:,} rows" for name, entry in corpus.info["sets"].items())
    print(f"{'already prepared' if done else 'prepared'}: {corpus.path} ({rows})")
    return EXIT_DONE


# --- the stages -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a corpus is made of: every row listed, the vocabulary, and the pieces to write."""

    listings: dict[str, list[Listing]]
    vocabulary: Vocabulary
    unknown: dict[str, int]
    shards: list[Shard]
    checks: Callable[[str], RowChecks]

    def noted(self) -> dict[str, Any]:
        """What the shards of an interrupted prepare must have been made from."""
        listings = {name: [listing.digest() for listing in group] for name, group in self.listings.items()}
        return {"listings": listings, "vocabulary": self.vocabulary.to_json()}


def list_work(recipe: Recipe, geometry: FrameGeometry) -> Work:
    """List every source, nothing is decoded yet; the vocabulary is of the training texts, or a given processor's."""
    listings = _list_sources(recipe)
    vocabulary, unknown = _vocabulary(recipe, listings["train"])
    shards = cut(listings, recipe.data.shard_rows)
    return Work(listings, vocabulary, unknown, shards, _checks(recipe, geometry, vocabulary))


def begin(path: Path, work: Work) -> None:
    """Note what the shards are made from, under the corpus's lock; those that are there are kept only if they agree.

    Rows that were refused because their file was not there are looked at again where it is there now.

    Raises:
        LockHeldError: another process writes its share of the shards.
    """
    for share in path.glob(f"{SHARES}/*.json"):
        if held := holder(share):
            raise LockHeldError(share, held)
    noted, note = work.noted(), path / NOTE
    if not note.exists() or read_json(note) != noted:
        for name in work.listings:
            shutil.rmtree(path / name, ignore_errors=True)
        write_json(note, noted)
    for leftover in path.glob("*/.*.tmp"):  # of a worker that was killed
        leftover.unlink(missing_ok=True)
    for name in work.listings:
        for shard in mended_shards(path / name):
            shard.unlink(missing_ok=True)


def missing_shards(path: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Those that are still to be written."""
    return [shard for shard in shards if not shard_path(path / shard.set, shard.number).exists()]


def _make(recipe: Recipe, geometry: FrameGeometry, path: Path, progress: bool) -> None:
    """Prepare what is missing of a corpus, under its lock."""
    # 1. List every source, and the vocabulary.
    work = list_work(recipe, geometry)
    # 2. Shards of an interrupted prepare are kept.
    begin(path, work)
    # 3. The others, in parallel.
    write_shards(path, missing_shards(path, work.shards), work.checks, recipe.data.num_proc, progress)
    # 4. Lengths, counts, refused rows, the report.
    num_shards = Counter(shard.set for shard in work.shards)
    sets = {name: finish_set(path / name, num_shards[name]) for name in work.listings}
    write_rejected(path, num_shards)
    summary = _write_summary(path, sets, work.vocabulary, work.unknown)
    if progress:
        say(report.render(summary, Console(stderr=True).width))
    check_counts(sets, recipe.data.max_rejected_percent, path)
    # 5. What transformers reads, then the file that makes it a corpus.
    _save_processor(recipe, work.vocabulary, path)
    identity = corpus_identity(recipe, geometry)
    # a run goes on only with the rows that it began with, whatever became of the manifest meanwhile
    rows = [listing.digest(("id", "text")) for listing in work.listings["train"]]
    info = {
        "format": identity["format"],
        "hash": hash_json({**identity, "rows": rows}),
        "identity": identity,
        "sets": sets,
        "vocabulary": work.vocabulary.to_json(),
        "files": _file_stamps(listing for group in work.listings.values() for listing in group),
        "versions": _versions(),
    }
    write_json(path / "corpus.json", info)
    for shard in work.shards:
        rejected_path(path / shard.set, shard.number).unlink(missing_ok=True)
    (path / NOTE).unlink(missing_ok=True)
    shutil.rmtree(path / SHARES, ignore_errors=True)


def check_names(recipe: Recipe) -> None:
    """Refuse names of sets that a corpus has folders for.

    Raises:
        RecipeError: `train` or `processor` among `eval.sets`.
    """
    taken = [name for name in recipe.eval.sets if name in ("train", "processor")]
    if taken:
        raise RecipeError(f"eval.sets.{taken[0]}: a corpus has a folder of that name already; choose another")


def corpus_geometry(recipe: Recipe) -> FrameGeometry:
    """The frames of a recipe's model, which decide what can be aligned."""
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


def _changed_files(path: Path) -> list[str]:
    """Tables that are no longer as they were when the corpus was prepared; those that are gone don't count."""
    if not (path / "corpus.json").exists():
        return []
    stamps = Corpus.open(path).info["files"].items()
    return [name for name, stamp in stamps if Path(name).exists() and _stamp(Path(name)) != stamp]


def _stale(path: Path, changed: Sequence[str]) -> str:
    listed = "".join(f"\n  {name}" for name in changed)
    return f"corpus {path} was prepared from files that have changed since:{listed}\ndelete it to prepare it anew"


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
