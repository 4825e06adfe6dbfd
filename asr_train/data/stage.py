"""A corpus on a node's own disk: copied once a node, each file read back and compared, else the shared one is read."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from asr_train.data.corpus import Corpus
from asr_train.errors import CorpusError
from asr_train.files import HashedFile, file_hash, read_json, write_json

VARIABLE: Final = "WAVEFLEET_STAGE_CORPUS_TO"  # a folder of this node's own, made and removed by who starts the ranks
WHERE: Final = "where.json"  # in there: which corpus the ranks of this node read
_COPIED = "copied.json"  # of a whole copy: what it is of, size and hash of each file
_HASH: Final = "xxh3_128"
_POLL_S = 0.2
_THREADS = 4  # a file server answers several at once
_SHARE = 0.95  # of the free room that a copy may take
_CHUNK_BYTES = 1 << 20
_GIB = 2**30


def on_this_node(corpus: Corpus, say: Callable[[str], None]) -> Corpus:
    """The corpus, or its copy on this node where one is asked for; the node's first rank makes it, the others wait."""
    if not (wanted := os.environ.get(VARIABLE)):
        return corpus
    folder = Path(wanted)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write_json(folder / WHERE, {"corpus": str(copied(corpus, folder, say))})
    while not (folder / WHERE).exists():
        time.sleep(_POLL_S)
    return Corpus.open(Path(read_json(folder / WHERE)["corpus"]))


def copied(corpus: Corpus, folder: Path, say: Callable[[str], None]) -> Path:
    """A whole copy of a corpus in `folder`, the one that is there or a new one; the corpus itself where none can be."""
    target = folder / corpus.path.name
    begun = time.monotonic()
    try:
        if _is_whole(corpus, target):
            say(f"the corpus is in {target} already")
            return target
        shutil.rmtree(target, ignore_errors=True)
        num_bytes = _copy(corpus, target)
    except (OSError, CorpusError) as error:
        shutil.rmtree(target, ignore_errors=True)
        say(f"the corpus could not be copied to {target}: {error}; it is read from {corpus.path}")
        return corpus.path
    say(f"the corpus is copied to {target}: {num_bytes / _GIB:.2f} GiB in {time.monotonic() - begun:.0f} s")
    return target


def _copy(corpus: Corpus, target: Path) -> int:
    """Copy every file, read it back, then mark the copy as whole; bytes copied.

    Raises:
        CorpusError: no room, or what was read back is not what was written.
        OSError: of the disks.
    """
    files = [path for path in sorted(corpus.path.rglob("*")) if path.is_file() and path.name != "lock.json"]
    num_bytes = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(target.parent).free
    if num_bytes > free * _SHARE:
        raise CorpusError(f"it takes {num_bytes / _GIB:.2f} GiB, and {free / _GIB:.2f} are free")
    names = [path.relative_to(corpus.path) for path in files]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _copy_file(corpus.path / name, target / name), names))
    content = {str(name): entry for name, entry in zip(names, entries, strict=True)}
    write_json(target / _COPIED, {"hash": corpus.hash, "files": content})
    return num_bytes


def _copy_file(source: Path, target: Path) -> dict[str, int | str]:
    """Size and hash of a file whose copy has them too."""
    with source.open("rb") as reader, HashedFile(target, _HASH) as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            writer.write(chunk)
    if writer.size != source.stat().st_size or file_hash(target, _HASH) != writer.digest:
        raise CorpusError(f"{target} is not what was written to it")
    return {"size": writer.size, "hash": writer.digest}


def _is_whole(corpus: Corpus, target: Path) -> bool:
    """Whether an earlier attempt's copy of this very corpus is there, each file as it was."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = read_json(target / _COPIED)
        return content["hash"] == corpus.hash and all(
            (target / name).stat().st_size == entry["size"] and file_hash(target / name, _HASH) == entry["hash"]
            for name, entry in content["files"].items()
        )
    return False
