"""Torch's distributed checkpoints, read without executing anything that they hold.

Torch reads `.metadata`, and every value that is no tensor, with plain pickle, which runs whatever the file says: a
run directory from somebody else would be a program. Here only the few classes that metadata is made of exist, and
values that are no tensor are not read at all.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from asr_train.errors import CheckpointError

_METADATA_CLASSES = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_ALLOWED = {(dcp_metadata.__name__, name) for name in _METADATA_CLASSES} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # the layout of a name
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's name for it
}


def load_tensors(
    tensors: dict[str, torch.Tensor], folder: Path, *, group: dist.ProcessGroup | None, no_dist: bool
) -> None:
    """Fill tensors from a checkpoint's folder of shards, in place, by name.

    Args:
        tensors: what to read, allocated; with the same names on every rank.
        folder: written by torch.distributed.checkpoint.
        group: the ranks that call this together.
        no_dist: this process alone reads.

    Raises:
        CheckpointError: the files are damaged, lack something, or hold something else than tensors.
    """
    try:
        load(
            tensors,
            storage_reader=_Reader(folder),
            planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=no_dist,
        )
    except CheckpointException as error:  # a BaseException, which `except Exception` misses
        raise CheckpointError(f"{folder} cannot be loaded: {causes(error)}") from error


def tensors_in(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of every tensor of a folder of shards.

    Raises:
        CheckpointError: the metadata is damaged, or holds something else than tensors.
    """
    found = {}
    for name, entry in _read_metadata(folder / ".metadata").state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder}: {name} is no tensor; it was not loaded")
        found[name] = (tuple(entry.size), entry.properties.dtype)
    return found


def causes(error: CheckpointException) -> str:
    """What went wrong on each rank, without the tracebacks."""
    found: Mapping[int, Any] = error.failures
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in found.items())


class _Reader(FileSystemReader):
    """Torch's reader, with metadata read here."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata = _read_metadata(folder / ".metadata")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Torch's planner, which loads tensors alone: anything else would be a pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor; it was not loaded")


class _Unpickler(pickle.Unpickler):
    """Pickle with the classes of checkpoint metadata and torch's dtypes, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint; it was not called")


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as stream:
            found = _Unpickler(stream).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path} holds no checkpoint metadata, but {type(found).__name__}")
    return found
