"""The order in which a checkpoint reaches the disk, from a trace of the system calls of two real ranks."""

import ctypes
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoint_lives import EVERY, NUM_STEPS, prepare, seed_of  # noqa: F401  seed_of is a fixture
from ranks import run_ranks
from test_elastic import WAYS

from asr_train.files import read_json

CALLS = "openat,open,creat,write,writev,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir"
_PR_SET_PTRACER, _ANY_TRACER = 0x59616D61, ctypes.c_ulong(-1)  # linux/prctl.h; where only ancestors may trace


class Call(NamedTuple):
    """A system call; it began when `begin` lines had been written, and was over after `end`."""

    name: str
    path: str  # of the file, or where a rename leads from
    target: str  # where a rename leads
    text: str
    begin: int
    end: int


def traced(way, recipe, folder):
    """Train on two ranks under strace; their calls, in the order in which they ended."""
    out = folder / f"{way}.strace"

    def live():
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY_TRACER)
        (folder / f"{way}-pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        if os.environ["RANK"] == "0":
            start_tracer()
        wait_for(lambda: "TracerPid:\t0" not in Path("/proc/self/status").read_text())
        return WAYS[way](recipe)

    def start_tracer():
        files = [folder / f"{way}-pid-{rank}" for rank in (0, 1)]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [argument for file in files for argument in ("-p", file.read_text())]
        subprocess.Popen(
            ["strace", "-f", "-y", "-s", "0", "-o", out, "-e", f"trace={CALLS}", *pids], stderr=subprocess.DEVNULL
        )

    assert run_ranks(2, live) == [0, 0]
    for rank in (0, 1):  # strace ends with them
        ended = re.compile(rf"^{(folder / f'{way}-pid-{rank}').read_text()} +[+]{{3}} exited", re.MULTILINE)
        wait_for(lambda ended=ended: ended.search(out.read_text()))
    return parsed(out.read_text())


def wait_for(is_so):
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, "strace may not trace here, or hangs"
        time.sleep(0.01)


def parsed(text):
    """The successful calls of a trace; strace writes one that others come in between of in two lines."""
    begun, calls = {}, []
    for number, line in enumerate(text.splitlines()):
        pid, _, rest = line.partition(" ")
        rest = rest.strip()
        begin = number
        if rest.endswith("<unfinished ...>"):
            begun[pid] = number, rest.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", rest):
            begin, first = begun.pop(pid)
            rest = first + rest[resumed.end() :]
        found = re.fullmatch(r"(\w+)\((.*)\)\s+= (-?\d+).*", rest)
        if found and not found[3].startswith("-"):
            paths = re.findall(r'<(/[^>]*)>|"([^"]*)"', found[2])
            calls.append(Call(found[1], *named(paths), rest, begin, number))
    return calls


def named(paths):
    """(path, target) of a call's arguments: folders of descriptors joined with the names that are below them."""
    full, base = [], ""
    for descriptor, name in paths:
        if descriptor:
            base = descriptor
        elif name:  # else it is what is written, of which nothing is shown
            full.append(os.path.join(base, name))  # noqa: PTH118  an absolute name stays
    full = full or [base]
    return full[0], full[1] if len(full) > 1 else ""


def last(calls, *names, path):
    return max((call for call in calls if call.name in names and call.path == path), key=lambda call: call.end)


WRITES = ("write", "writev", "pwrite64")
SYNCS = ("fsync", "fdatasync")
MOVES = ("rename", "renameat", "renameat2")
DELETES = ("unlink", "unlinkat", "rmdir")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_everything_is_on_disk_before_the_name_and_nothing_is_deleted_before_that_is(
    seed_of,  # noqa: F811
    way,
    asynchronous,
    tmp_path,
):
    seed = seed_of(way)
    recipe = seed.recipe(f"{way}-traced", asynchronous=asynchronous)
    run = prepare(seed, recipe, NUM_STEPS - 3 * EVERY)
    files_of = read_json(run.checkpoints / f"step-{NUM_STEPS - 3 * EVERY:010d}" / "MANIFEST.json")["files"]
    calls = traced(way, recipe, tmp_path)
    commits = [call for call in calls if call.name in MOVES and "/.staging-" in call.path and "/step-" in call.target]
    assert len(commits) == 3
    older = str(run.checkpoints / f"step-{NUM_STEPS - 3 * EVERY:010d}")
    for commit in commits:
        check_written(calls, commit, files_of)
        check_deleted(calls, commit, older, files_of)
        older = commit.target


def check_written(calls, commit, files):
    """Each file: its last write, then its fsync, then the folders', then the rename; the manifest after all others."""
    aside = commit.path
    moved = {call.target: call for call in calls if call.name in MOVES and call.target.startswith(f"{aside}/")}
    assert set(moved) == {f"{aside}/shards/.metadata"}
    flushed = {}
    for name in (*files, "MANIFEST.json"):
        path = f"{aside}/{name}"
        made = moved.get(path)
        written_as = made.path if made else path
        writes = [call for call in calls if call.name in WRITES and call.path == written_as]
        sync = last(calls, *SYNCS, path=written_as)
        assert writes, name
        assert max(call.end for call in writes) < sync.begin, f"{name} is written to after its fsync"
        assert sync.end < (made or commit).begin, f"{name} gets its name before it is on disk"
        flushed[name] = sync
        folder = last(calls, *SYNCS, path=os.path.dirname(path))  # noqa: PTH120
        assert (made or sync).end < folder.begin, f"the folder of {name} is on disk before its entry is"
        assert folder.end < commit.begin, f"the folder of {name} is not on disk at the rename"
    manifest = min(call.begin for call in calls if call.path == f"{aside}/MANIFEST.json")
    for name in files:
        assert flushed[name].end < manifest, f"MANIFEST.json is begun before {name} is on disk"
    late = [call for call in calls if call.begin > commit.begin and call.name in WRITES]
    assert not [call for call in late if call.path.startswith((aside, commit.target))]


def check_deleted(calls, commit, older, files):
    """The older checkpoint goes only when the new one's name is on disk, and all of it has been read again."""
    parent = os.path.dirname(commit.target)  # noqa: PTH120
    is_named = min(call.end for call in calls if call.name in SYNCS and call.path == parent and call.begin > commit.end)
    for name in (*files, "MANIFEST.json"):
        path = f"{commit.target}/{name}"
        reads = [call for call in calls if call.name == "openat" and call.path == path and "O_RDONLY" in call.text]
        assert any(commit.end < call.begin for call in reads), f"{name} was not read again"
    all_read = max(
        min(call.end for call in calls if call.path == f"{commit.target}/{name}" and call.begin > commit.end)
        for name in files
    )
    [gone] = (call for call in calls if call.name in MOVES and call.path == older)
    assert gone.target.startswith(f"{parent}/.trash-")
    assert max(is_named, all_read) < gone.begin
    deletions = [call for call in calls if call.name in DELETES and call.path.startswith((older, gone.target))]
    assert len(deletions) > len(files)
    assert min(call.begin for call in deletions) > gone.end
