"""Checkpoints: written aside by all ranks, then given their name; a checkpoint of that name is whole.

A checkpoint `step-0000000100/` holds `shards/` (torch's distributed format: model and optimizer), `state.json`
(position, best metrics, GradScaler) and `MANIFEST.json` (every file with its size, and what the checkpoint belongs to).
"""

import re
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from asr_train.errors import CheckpointError, TrainingError
from asr_train.files import publish_dir, read_json, write_json
from asr_train.model import SpeechModel
from asr_train.safe_load import causes, load_tensors
from asr_train.state import TrainState
from asr_train.strategy import DeepSpeedParallel, Parallel

# torch says so at each save and load of a single process, which knows
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_Value = TypeVar("_Value")
_NAME = re.compile(r"step-(\d{10})")
_DEEPSPEED = "deepspeed"  # folder of DeepSpeed's own files in a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates of the run when it was written."""
        return int(self.manifest["step"])

    def state(self) -> dict[str, Any]:
        """The content of state.json: `train` and `scaler`.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            content: dict[str, Any] = read_json(self.path / "state.json")
        except ValueError as error:
            raise CheckpointError(f"{self.path / 'state.json'} is damaged: {error}") from None
        return content


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:010d}"


def save(
    folder: Path, parallel: Parallel, state: TrainState, facts: Mapping[str, Any], *, replace: bool = False
) -> Path:
    """Write a checkpoint of the current state; every rank calls this, and returns when it is committed.

    One that stands there already is kept, unless it is not whole, or `replace` says that the state has changed since.

    Raises:
        TrainingError: it could not be written; what was there before is untouched.
    """
    final = checkpoint_path(folder, state.step)
    if _agree(parallel, not replace and open_checkpoint(final) is not None):
        return final
    staging = folder / f".staging-{final.name}-{_agree(parallel, uuid.uuid4().hex[:8])}"
    try:
        _write_tensors(staging, parallel)
        if parallel.rank == 0:
            _write_manifest(staging, parallel, state, facts)
            if final.exists():
                final.rename(folder / f".trash-{final.name}-{uuid.uuid4().hex[:8]}")
            publish_dir(staging, final)
            remove_leftovers(folder)
    except (CheckpointException, OSError) as error:  # the first is a BaseException, which `except Exception` misses
        if parallel.rank == 0:  # what is half written would fill the disk that was full already
            shutil.rmtree(staging, ignore_errors=True)
        cause = causes(error) if isinstance(error, CheckpointException) else str(error)
        raise TrainingError(
            f"the checkpoint of step {state.step} could not be written to {folder}: {cause}\n"
            "Those before it are untouched; make room there, and the same command goes on from the newest."
        ) from error
    parallel.accelerator.wait_for_everyone()
    return final


def committed(folder: Path) -> list[Checkpoint]:
    """Checkpoints that are whole, oldest first: manifest there, every file there with its size."""
    found = []
    for path in sorted(folder.glob("step-*")):
        if _NAME.fullmatch(path.name) and (whole := open_checkpoint(path)) is not None:
            found.append(whole)
    return found


def open_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder, if it is whole."""
    try:
        manifest = read_json(path / "MANIFEST.json")
        sizes = manifest["files"]
        is_whole = all((path / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError, TypeError, KeyError):  # a file is missing; the manifest is torn, or something else
        return None
    return Checkpoint(path, manifest) if is_whole else None


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    whole = committed(folder)
    if whole:
        return whole[-1]
    if broken := sorted(path.name for path in folder.glob("step-*")):
        raise CheckpointError(
            f"{folder} holds {', '.join(broken)}, and none is whole. Nothing was changed. "
            "Bring one back, or move this folder away to start from step 0."
        )
    return None


def passed_over(folder: Path) -> list[str]:
    """Names of checkpoints that are not whole, and newer than the newest that is."""
    last = newest(folder)
    whole = [found.path.name for found in committed(folder)]
    later = (path.name for path in sorted(folder.glob("step-*")) if last is None or path.name > last.path.name)
    return [name for name in later if name not in whole]


def best(folder: Path) -> Checkpoint | None:
    """The checkpoint of the best evaluation; the newest one when none was evaluated or kept."""
    last = newest(folder)
    if last is None:
        return None
    best_step = last.state()["train"].get("best_step")
    return next((found for found in committed(folder) if found.step == best_step), last)


def restore(checkpoint: Checkpoint, parallel: Parallel, facts: Mapping[str, Any]) -> TrainState:
    """Load model, optimizer, GradScaler and position; every rank calls this, at any world size.

    Raises:
        CheckpointError: it belongs to another corpus or plan, or cannot be read.
    """
    differ = [key for key in ("corpus_hash", "plan_hash") if checkpoint.manifest.get(key) != facts[key]]
    if differ:
        raise CheckpointError(
            f"{checkpoint.path} was written for another {' and '.join(key.split('_')[0] for key in differ)}; "
            "going on would repeat and leave out utterances. Bring the corpus back, or choose another run_dir."
        )
    _read_tensors(checkpoint, parallel)
    content = checkpoint.state()
    if parallel.accelerator.scaler is not None and content["scaler"]:
        parallel.accelerator.scaler.load_state_dict(content["scaler"])
    return TrainState.from_json(content["train"])


def load_weights(checkpoint: Checkpoint | Path, model: SpeechModel) -> None:
    """Load a checkpoint's weights into an unwrapped model, in one process, whatever world size wrote it."""
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
    weights = get_model_state_dict(model)
    load_tensors({"model": weights}, path / "shards", no_dist=True)
    model.load_state_dict(weights)


def prune(folder: Path, state: TrainState, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one; one process calls this, after a commit."""
    whole = committed(folder)
    kept = {found.step for found in whole[-keep_last:]} | {state.best_step}
    for found in whole:
        if found.step not in kept:
            trash = folder / f".trash-{found.path.name}-{uuid.uuid4().hex[:8]}"
            found.path.rename(trash)
            shutil.rmtree(trash)


def remove_leftovers(folder: Path) -> None:
    """Delete what dead attempts left half written; only the lock's holder calls this, before it writes anything."""
    for pattern in (".staging-*", ".trash-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def _write_manifest(staging: Path, parallel: Parallel, state: TrainState, facts: Mapping[str, Any]) -> None:
    """Write what is no tensor, then the list of all files."""
    scaler = parallel.accelerator.scaler
    write_json(staging / "state.json", {"train": state.to_json(), "scaler": scaler and scaler.state_dict()})
    about = {"step": state.step, "world_size": parallel.world_size, "sharding": _sharding(parallel), **facts}
    files = {str(path.relative_to(staging)): path.stat().st_size for path in _files(staging)}
    write_json(staging / "MANIFEST.json", {**about, "files": files})


def _sharding(parallel: Parallel) -> str:
    """The format of optimizer state: torch's, which DDP and FSDP2 share at any world size, or a ZeRO stage's own."""
    return f"zero{parallel.zero_stage}" if isinstance(parallel, DeepSpeedParallel) else "torch"


def _write_tensors(staging: Path, parallel: Parallel) -> None:
    """Write model and optimizer; all ranks."""
    if not isinstance(parallel, DeepSpeedParallel):
        model_state, optimizer_state = get_state_dict(parallel.model, parallel.optimizer)
        save_tensors(
            {"model": model_state, "optimizer": optimizer_state},
            storage_writer=FileSystemWriter(staging / "shards", overwrite=False),
            no_dist=parallel.world_size == 1,
        )
        return
    parallel.engine.save_checkpoint(str(staging), tag=_DEEPSPEED, save_latest=False)
    weights = parallel.full_weights()  # in torch's format too: evaluation and export need nothing of DeepSpeed's
    if parallel.rank == 0:
        writer = FileSystemWriter(staging / "shards", overwrite=False)
        save_tensors({"model": weights}, storage_writer=writer, no_dist=True)
    parallel.accelerator.wait_for_everyone()


def _read_tensors(checkpoint: Checkpoint, parallel: Parallel) -> None:
    """Load model and optimizer in place; all ranks.

    Raises:
        CheckpointError: DeepSpeed's state fits its own stage and number of processes only.
    """
    written = {key: checkpoint.manifest[key] for key in ("sharding", "world_size")}
    here = {"sharding": _sharding(parallel), "world_size": parallel.world_size}
    if written["sharding"] != here["sharding"] or (isinstance(parallel, DeepSpeedParallel) and written != here):
        raise CheckpointError(
            f"{checkpoint.path} was written by {written['world_size']} processes in the format {written['sharding']!r},"
            f" and this is {here['world_size']} in {here['sharding']!r}: go on with the same accelerate config and,"
            " under DeepSpeed, the same number of processes"
        )
    if isinstance(parallel, DeepSpeedParallel):
        parallel.engine.load_checkpoint(str(checkpoint.path), tag=_DEEPSPEED)
        return
    model_state, optimizer_state = get_state_dict(parallel.model, parallel.optimizer)
    tensors: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    load_tensors(tensors, checkpoint.path / "shards", no_dist=parallel.world_size == 1)
    set_state_dict(
        parallel.model,
        parallel.optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _agree(parallel: Parallel, value: _Value) -> _Value:
    """Rank 0's value, on every rank."""
    if parallel.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
