"""`stage_corpus_to`: a folder on this node for a copy of the corpus, which the ranks make (`asr_train.data.stage`)."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asr_train.errors import say

VARIABLE = "WAVEFLEET_STAGE_CORPUS_TO"
WHERE = "where.json"


@contextmanager
def corpus_folder(wanted: str | None, name: str) -> Iterator[dict[str, str]]:
    """Variables for the ranks of this node, while there is such a folder; it goes with all that is in it at the end.

    Where it cannot be, that is said, there are no variables, and the corpus is read where it is.

    Args:
        wanted: a folder, in which $NAME stands for a variable of this node; None wants none.
        name: of the run and node, so that two of a machine do not meet. What an attempt that was killed left under it
            is used again.
    """
    folder = None
    if wanted is not None:
        try:
            folder = _made(wanted, name)
        except OSError as error:
            say(f"stage_corpus_to: {wanted}: {error}; the corpus is read where it is")
    try:
        yield {} if folder is None else {VARIABLE: str(folder)}
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _made(wanted: str, name: str) -> Path:
    """A folder of ours that others cannot write.

    Raises:
        OSError: a variable is not set here, or something else is in the way.
    """
    base = Path(os.path.expandvars(wanted)).expanduser()
    if "$" in str(base):
        raise OSError(f"{base} names a variable that is not set on this node")
    if not base.is_absolute():
        raise OSError(f"{base} should be absolute")
    base.mkdir(exist_ok=True)
    folder = base / f"wavefleet-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise OSError(f"{folder} is somebody else's")
    folder.chmod(0o700)
    (folder / WHERE).unlink(missing_ok=True)  # what the ranks of an earlier attempt were told
    return folder
