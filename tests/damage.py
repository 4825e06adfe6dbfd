"""Damage to checkpoints on disk, of every kind that a disk, a copy or a person does."""

import json
from pathlib import Path

from asr_train.checkpoints import MANIFEST
from asr_train.files import hash_json, read_json


def edit_manifest(checkpoint: Path, **changes) -> None:
    """Change what a manifest says, hash of itself and all: as if it had been written so."""
    manifest = {**read_json(checkpoint / MANIFEST), **changes}
    del manifest["manifest_hash"]
    manifest["manifest_hash"] = hash_json(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def flip_bit(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """The last ten bytes are gone."""
    path.write_bytes(path.read_bytes()[:-10])
