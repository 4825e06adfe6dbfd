"""Full disks, said with what to do."""

import errno
import shutil
from pathlib import Path
from typing import Final

_GIB: Final = 2**30


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room(error: OSError, path: Path | None = None) -> str:
    """What to say of a full disk: where, how much is free, and what decides where things are written.

    Args:
        error: what the operating system said.
        path: what was being written, where the error does not name it.
    """
    name = path or (Path(error.filename) if isinstance(error.filename, str) else None)
    where = next((folder for folder in (name, *name.parents) if folder.exists()), None) if name else None
    room = ""
    if where is not None:
        usage = shutil.disk_usage(where)
        room = f": {usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB"
    what = "the quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
    return (
        f"{what}{f' where {name} is' if name else ''}{room}. Make room, or write elsewhere: "
        "data.corpus_root (corpora), run_dir (runs), HF_HOME (what comes from the hub), TMPDIR"
    )
