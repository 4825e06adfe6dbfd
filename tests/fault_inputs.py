"""What tests of bad input share: commands run as a user runs them, files that are programs, a disk that fills up."""

import contextlib
import ctypes
import hashlib
import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from damage import edit_manifest
from ranks import run_ranks
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from asr_train.checkpoints import open_checkpoint
from asr_train.errors import run_main
from asr_train.files import file_hash

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h


class Said(NamedTuple):
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def command(program, *arguments):
    """A command's `main` in this process, by the same `run_main` as its process has."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_main(program, [str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            code = ended.code
    return Said(code, out.getvalue(), err.getvalue())


def command_in_rank(program, *arguments):
    """The same in a process of its own, for commands that leave accelerate's state and signal handlers behind."""
    return run_ranks(1, command, program, *arguments)[0]


def check_refused(said, code, *words):
    """A refusal: the exit code, a message for a person with these words, and no traceback."""
    assert said.code == code, said.err
    assert "error: " in said.err
    assert "Traceback" not in said.err, said.err
    for word in words:
        assert str(word) in said.err, said.err


def contents(folder, *parts):
    """Path -> hash of every file of a folder, or of some parts of it: equal before and after, nothing was lost."""
    roots = [folder / part for part in parts] or [folder]
    files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


class Trap:
    """A program that makes a folder when it is run, in the forms that files are loaded in."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    def was_sprung(self):
        return self.path.exists()

    def check_armed(self, load, data):
        """It does go off when it is loaded carelessly; else a test of it would show nothing."""
        load(data)
        assert self.was_sprung()
        self.path.rmdir()

    def pickled(self):
        data = pickle.dumps(self)
        self.check_armed(pickle.loads, data)
        return data

    def saved(self):
        """As `torch.save` writes it."""
        stream = io.BytesIO()
        torch.save({"weight": self}, stream)
        self.check_armed(lambda data: torch.load(io.BytesIO(data), weights_only=False), stream.getvalue())
        return stream.getvalue()

    def tagged(self):
        """As a YAML value."""
        data = f"!!python/object/apply:os.mkdir ['{self.path}']"
        self.check_armed(yaml.unsafe_load, data)
        return data


def declare(checkpoint):
    """Put the files of a checkpoint into its manifest as they are now, as who meddles with them would."""
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "hash": file_hash(checkpoint / name, "xxh3_128")}
        for name in open_checkpoint(checkpoint).manifest["files"]
    }
    edit_manifest(checkpoint, files=files)


def set_trap_in_metadata(checkpoint, trap):
    (checkpoint / "shards" / ".metadata").write_bytes(trap.pickled())
    declare(checkpoint)


def set_trap_in_a_value(checkpoint, trap):
    """In a value that is no tensor: the metadata names bytes behind those of the others."""
    path = checkpoint / "shards" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    shard = next((checkpoint / "shards").glob("*.distcp"))
    data = trap.saved()
    index = MetadataIndex("model.value")
    metadata.state_dict_metadata["model.value"] = BytesStorageMetadata()
    metadata.storage_data[index] = _StorageInfo(shard.name, shard.stat().st_size, len(data))
    shard.write_bytes(shard.read_bytes() + data)
    path.write_bytes(pickle.dumps(metadata))
    declare(checkpoint)


def on_small_disk(folder, size, story, *arguments):
    """Run `story(*arguments)` where `folder` is a disk of that size; what it returned.

    A forked process in a mount namespace of its own, so that the disk is gone with it. Without root it needs a kernel
    that lets users make namespaces.
    """

    def isolated():
        uid, gid = os.getuid(), os.getgid()
        flags = _CLONE_NEWNS if uid == 0 else _CLONE_NEWNS | _CLONE_NEWUSER
        if ctypes.CDLL(None).unshare(flags) != 0:
            return False, None
        if uid != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        mounts = (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)])
        if any(subprocess.run(["mount", *options], check=False).returncode for options in mounts):
            return False, None
        return True, story(*arguments)

    folder.mkdir(parents=True, exist_ok=True)
    (is_mounted, result), *_ = run_ranks(1, isolated)
    if not is_mounted:
        why = "a small disk cannot be mounted here"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    return result


def remount(folder, options):
    """Change a small disk: more room, `size=10m`, or `ro`; for use in a story."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
