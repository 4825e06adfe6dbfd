"""`python -m asr_train.prepare_share RECIPE [k=v] --begin N`, then `--share I/N`: a corpus prepared by N processes.

The first says what is to be done, as JSON; each of the others writes its share of the shards, on any host that sees the
same files. What they leave is an interrupted prepare: `python -m asr_train.prepare` makes the corpus of it.
"""

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from asr_train.config import Recipe
from asr_train.data.audio import MISSING_FILE
from asr_train.data.corpus import corpus_path
from asr_train.data.shard_pool import Shard, write_shards
from asr_train.data.shards import rejected_path
from asr_train.errors import EXIT_DONE, CorpusError, RecipeError, run_main
from asr_train.files import read_json, read_jsonl
from asr_train.lock import HeartbeatLock, LockHeldError
from asr_train.prepare import (
    NOTE,
    SHARES,
    Work,
    alone,
    begin,
    check_names,
    corpus_geometry,
    list_work,
    missing_shards,
    who,
)
from asr_train.recipe import load_recipe


def plan_shares(recipe: Recipe, num_shares: int) -> dict[str, Any]:
    """Get a corpus ready for those that write shares of it.

    Returns:
        `corpus`, its path, and `state`: `complete`; `busy`, somebody (`who`) prepares it; or `begun`, with `pending`:
        the shares, counted from 1, that have shards to write.

    Raises:
        SourceError, CorpusError, RecipeError: as `prepare`.
    """
    check_names(recipe)
    geometry = corpus_geometry(recipe)
    path = corpus_path(recipe, geometry)
    if (path / "corpus.json").exists():
        return {"corpus": str(path), "state": "complete"}
    try:
        with HeartbeatLock(path / "lock.json"):
            work = list_work(recipe, geometry)
            begin(path, work)
    except OSError as error:
        raise CorpusError(f"corpus {path} cannot be written: {error}") from error
    except LockHeldError as held:
        return {"corpus": str(path), "state": "busy", "who": who(held.holder)}
    numbers = range(1, num_shares + 1)
    pending = [number for number in numbers if missing_shards(path, share_of(work.shards, number, num_shares))]
    return {"corpus": str(path), "state": "begun", "pending": pending}


def share_of(shards: Sequence[Shard], number: int, num_shares: int) -> Sequence[Shard]:
    """Neighbouring shards, as many as in every other share, or one more; shares count from 1."""
    return shards[len(shards) * (number - 1) // num_shares : len(shards) * number // num_shares]


def write_share(recipe: Recipe, number: int, num_shares: int, *, progress: bool = True) -> Path:
    """Write what is missing of a share; the corpus's path.

    Raises:
        CorpusError: not begun, or begun with other sources; files of its rows are not there; as `prepare`.
    """
    geometry = corpus_geometry(recipe)
    path = corpus_path(recipe, geometry)

    def work() -> None:
        found = list_work(recipe, geometry)
        _check_begun(path, found)
        shards = missing_shards(path, share_of(found.shards, number, num_shares))
        write_shards(path, shards, found.checks, recipe.data.num_proc, progress)
        _check_files(path, shards, recipe.data.max_rejected_percent)

    alone(path / SHARES / f"{number}-of-{num_shares}.json", path, work)
    return path


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m asr_train.prepare_share", description=__doc__)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--begin", type=int, metavar="N", help="note what is to be done, in N shares")
    what.add_argument("--share", metavar="I/N", help="write share I of N, from 1")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.begin is not None:
        with redirect_stdout(sys.stderr):  # what libraries print is no part of the answer
            found = plan_shares(recipe, arguments.begin)
        print(json.dumps(found))
        return EXIT_DONE
    number, num_shares = _read_share(arguments.share)
    path = write_share(recipe, number, num_shares)
    print(f"share {number} of {num_shares} is done: {path}")
    return EXIT_DONE


def _read_share(text: str) -> tuple[int, int]:
    number, _, num_shares = text.partition("/")
    if not (number.isdecimal() and num_shares.isdecimal() and 1 <= int(number) <= int(num_shares)):
        raise RecipeError(f"--share {text!r}: should be I/N, as in 3/10")
    return int(number), int(num_shares)


def _check_begun(path: Path, work: Work) -> None:
    """Refuse to write shards that are not those of the others."""
    note = path / NOTE
    if not note.exists():
        raise CorpusError(f"corpus {path} is not begun: --begin comes first")
    if read_json(note) != work.noted():
        raise CorpusError(
            f"the sources that {socket.gethostname()} lists are not those that corpus {path} was begun with: are the "
            "same file systems mounted here, or was a table changed meanwhile? Nothing was written"
        )


def _check_files(path: Path, shards: Sequence[Shard], max_rejected_percent: float) -> None:
    """Refuse a share whose files are missing: on one host of many that hints at a file system that is not mounted."""
    num_rows = sum(shard.stop - shard.start for shard in shards)
    gone = [
        entry["value"]
        for shard in shards
        for entry in read_jsonl(rejected_path(path / shard.set, shard.number))
        if entry["reason"] == MISSING_FILE
    ]
    if 100 * len(gone) > max_rejected_percent * num_rows:
        raise CorpusError(
            f"{len(gone):,} of the {num_rows:,} rows of this share have no file on {socket.gethostname()}, "
            f"{gone[0]} for one; is their file system mounted there? "
            "The same command does again what has its files by then, and goes on without the others"
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
