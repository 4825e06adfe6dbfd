"""Save a training: stage, hash, commit, verify, and only then delete what is older.

A checkpoint is written into a fresh folder by all ranks, each file hashed while it is written and fsynced; the ranks
tell each other what they wrote, rank 0 writes the manifest and gives the folder its name. Then all of it is read
again, and only when it is right are older ones deleted. All of this goes over a gloo group of its own, in a thread of
its own when the recipe says so, so that it never meets the loop's collectives.

`checkpoints` says what is on disk, `restore` goes on from it.
"""

import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from asr_train import checkpoints, generators
from asr_train.checkpoints import GENERATORS, MANIFEST, SHARDS, STATE, Checkpoint, generators_file
from asr_train.config import CheckpointSettings
from asr_train.errors import CheckpointError, TrainingError, say
from asr_train.files import HashedFile, HashName, fsync_dir, hash_json
from asr_train.live_state import Snapshots, written_here
from asr_train.safe_load import causes
from asr_train.state import TrainState
from asr_train.strategy import Parallel

# torch says so at each save and load of a single process, which knows
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_TIMEOUT = timedelta(minutes=30)  # a rank that writes its part for longer is taken for dead
_Value = TypeVar("_Value")
_Files = dict[str, dict[str, Any]]  # relative path -> size and hash


class Ranks:
    """What the ranks tell each other about checkpoints, over a gloo group of its own; every call is a collective."""

    def __init__(self, parallel: Parallel) -> None:
        self.rank, self.world_size = parallel.rank, parallel.world_size
        self.group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if self.world_size > 1 else None

    def gather(self, value: _Value) -> list[_Value]:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_rank_0(self, make: Callable[[], _Value]) -> _Value:
        """What `make` returns on rank 0, on every rank; what it raises there, every rank raises.

        Raises:
            CheckpointError: `make` raised one.
            OSError: `make` raised one.
        """
        values: list[Any] = [None, None]
        if self.rank == 0:
            try:
                values[0] = make()
            except (CheckpointError, OSError) as error:
                values[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group)
        if values[1] is not None:
            raise values[1]
        return values[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, the same on every rank.

    Attributes:
        step: what was to be saved.
        path: the committed checkpoint; None when it could not be written.
        problem: what went wrong, by rank.
        seconds: from the call until it was committed and verified.
        blocked_s: of these, how long training stood still.
    """

    step: int
    path: Path | None
    problem: str | None
    seconds: float
    blocked_s: float


class Saver:
    """Writes checkpoints of one training; made by all ranks together, and called by all at the same steps.

    Attributes:
        folder: the run's folder of checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        parallel: Parallel,
        ranks: Ranks,
        settings: CheckpointSettings,
        facts: Mapping[str, Any],
        *,
        parent: str | None = None,
        on_commit: Callable[[Checkpoint], None] | None = None,
    ) -> None:
        """Prepare to save.

        Args:
            folder: where checkpoints go.
            parallel: what is trained.
            ranks: all of them.
            settings: how to save, and what to keep.
            facts: what the manifest says of the run; `attempt` must be among them.
            parent: name of the checkpoint that this attempt went on from.
            on_commit: called on rank 0 with each committed checkpoint, in the saving thread.
        """
        self.folder, self.ranks = folder, ranks
        self._parallel, self._settings, self._facts = parallel, settings, dict(facts)
        self._parent = parent
        self._on_commit = on_commit
        self._snapshots = Snapshots(parallel)
        self._thread: threading.Thread | None = None
        self._result: SaveResult | None = None
        self._failure: BaseException | None = None

    def save(self, state: TrainState, *, score: tuple[str, float, bool] | None = None, wait: bool = False) -> None:
        """Begin a checkpoint of the current state, after waiting for the one before; every rank calls this.

        How it ended is what `take_result` gives, now or later. The state may be changed as soon as this returns.

        Args:
            state: where the run is.
            score: metric that picks the best model, its value now, and whether more is better.
            wait: return when it is committed, whatever the recipe says.
        """
        start = time.monotonic()
        self.wait()
        scaler = self._parallel.accelerator.scaler
        content = {"train": state.to_json(), "scaler": scaler.state_dict() if scaler is not None else None}
        plain = _Plain(state.step, json.dumps(content, indent=2), json.dumps(generators.current()), score)
        staging = self.folder / self.ranks.from_rank_0(lambda: checkpoints.staging_name(self._facts["attempt"]))
        if wait or not self._settings.asynchronous:
            self._run(start, staging, partial(written_here, self._parallel), plain, None)
            return
        tensors = self._snapshots.take()
        blocked_s = time.monotonic() - start
        self._thread = threading.Thread(
            target=self._run, args=(start, staging, lambda: tensors, plain, blocked_s), name=f"save {state.step}"
        )
        self._thread.start()

    def take_result(self) -> SaveResult | None:
        """How the last save ended, once; None while it is under way, and when there is nothing new.

        Ranks may see it after different steps; after `wait` all do.

        Raises:
            TrainingError: a rank was lost during the save.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise TrainingError(f"saving broke off: {failure}; checkpoints before are untouched") from failure
        result, self._result = self._result, None
        return result

    def wait(self) -> None:
        """Wait for the save that is under way."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Wait for the save that is under way, and free the copies; for the end of an attempt, good or bad."""
        self.wait()
        self._snapshots.close()

    def _run(
        self,
        start: float,
        staging: Path,
        tensors: Callable[[], dict[str, torch.Tensor]],
        plain: "_Plain",
        blocked_s: float | None,
    ) -> None:
        """Write, commit, verify; leaves `_result`, or `_failure` when the ranks could not even agree."""
        try:
            path, problem = self._write_and_commit(staging, tensors, plain)
            seconds = time.monotonic() - start
            self._result = SaveResult(plain.step, path, problem, seconds, seconds if blocked_s is None else blocked_s)
        except BaseException as error:  # a thread's exception is seen by nobody else
            self._failure = error

    def _write_and_commit(
        self, staging: Path, tensors: Callable[[], dict[str, torch.Tensor]], plain: "_Plain"
    ) -> tuple[Path | None, str | None]:
        """The committed checkpoint's path, or what went wrong; the same on every rank."""
        ranks = self.ranks
        files, problem = self._write(staging, tensors(), plain)
        told = ranks.gather((files, problem))
        problems = [text for _, text in told if text]
        path: Path | None = None
        if not problems:
            everything = {name: entry for rank_files, _ in told for name, entry in rank_files.items()}
            try:
                path = ranks.from_rank_0(lambda: self._commit(staging, everything, plain))
            except OSError as error:
                problems = [f"rank 0: {error}"]
        if path is None:
            if ranks.rank == 0:  # what is half written would fill the disk that was full already
                shutil.rmtree(staging, ignore_errors=True)
            return None, "; ".join(problems)
        return self._verify_and_prune(path)

    def _write(self, staging: Path, tensors: dict[str, torch.Tensor], plain: "_Plain") -> tuple[_Files, str | None]:
        """Write this rank's files; what they are, or what went wrong."""
        algorithm = self._settings.hash
        writer = _Writer(staging / SHARDS, algorithm)
        try:
            # every rank comes through here, whatever fails on one: torch gathers the failures
            save_tensors(
                tensors,
                storage_writer=writer,
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self.ranks.group,
                no_dist=self.ranks.world_size == 1,
            )
            files = {f"{SHARDS}/{name}": entry for name, entry in writer.files.items()}
            name = generators_file(self.ranks.rank)
            (staging / name).parent.mkdir(exist_ok=True)
            files[name] = _write_text(staging / name, plain.generators, algorithm)
            if self.ranks.rank == 0:
                files[STATE] = _write_text(staging / STATE, plain.state, algorithm)
        except CheckpointException as error:  # a BaseException, which `except Exception` misses
            # the same on all ranks: rank 0 reports it
            return {}, causes(error) if self.ranks.rank == 0 else None
        except OSError as error:
            return {}, f"rank {self.ranks.rank}: {error}"
        return files, None

    def _commit(self, staging: Path, files: _Files, plain: "_Plain") -> Path:
        """Write the manifest and give the folder its name; rank 0."""
        manifest = {
            "step": plain.step,
            **self._facts,
            "parent": self._parent,
            "score": plain.score and dict(zip(("metric", "value", "higher_is_better"), plain.score, strict=True)),
            "written": time.time(),
            "hash": self._settings.hash,
            "files": dict(sorted(files.items())),
        }
        text = json.dumps({**manifest, "manifest_hash": hash_json(manifest)}, indent=2)
        _write_text(staging / MANIFEST, text, self._settings.hash)
        for folder in (staging / SHARDS, staging / GENERATORS, staging):
            fsync_dir(folder)
        final = self.folder / checkpoints.name_for(self.folder, plain.step)
        os.rename(staging, final)
        fsync_dir(self.folder)
        return final

    def _verify_and_prune(self, path: Path) -> tuple[Path | None, str | None]:
        """Read the new checkpoint again, all ranks a share; then delete what need not be kept, or set it aside."""
        ranks = self.ranks
        checkpoint = checkpoints.open_checkpoint(path)
        mine = checkpoints.share(checkpoint, ranks.rank, ranks.world_size)
        problem = checkpoint.problem or "; ".join(checkpoints.problems_in(checkpoint, mine)) or None
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.gather(problem)) if text]
        if problems:
            why = "; ".join(problems)
            try:
                ranks.from_rank_0(lambda: checkpoints.quarantine(checkpoint, why))
            except OSError as error:
                why += f"; and it could not be set aside: {error}"
            return None, f"{path.name} was written, and is not the same when read again: {why}"
        self._parent = path.name
        if ranks.rank == 0:
            self._tell_commit(checkpoint)
            self._prune()
        return path, None

    def _tell_commit(self, checkpoint: Checkpoint) -> None:
        """Call `on_commit`; what it cannot write costs a note, where an error on one rank would end the training."""
        if self._on_commit is not None:
            try:
                self._on_commit(checkpoint)
            except OSError as error:
                say(f"{checkpoint.name} is written, and could not be noted: {error}")

    def _prune(self) -> None:
        """Delete what need not be kept; a disk that refuses is no reason to end a training."""
        candidates = checkpoints.whole(self.folder)
        settings = self._settings
        keep = checkpoints.kept(candidates, last=settings.keep_last, best=settings.keep_best, every=settings.keep_every)
        for checkpoint in candidates:
            if checkpoint not in keep:
                try:
                    checkpoints.remove(checkpoint.path)
                except OSError as error:
                    say(f"{checkpoint.path} could not be deleted: {error}")


@dataclass(frozen=True)
class _Plain:
    """What of a checkpoint is no tensor."""

    step: int
    state: str  # JSON
    generators: str  # JSON
    score: tuple[str, float, bool] | None


# --- files --------------------------------------------------------------------------------------------------------


def _write_text(path: Path, text: str, algorithm: HashName) -> dict[str, Any]:
    """Write a file of a checkpoint that is no tensor; its size and hash."""
    with HashedFile(path, algorithm) as stream:
        stream.write(text.encode("utf-8"))
    return {"size": stream.size, "hash": stream.digest}


class _HashingFileSystem(FileSystem):
    """Torch's access to files, which hashes and fsyncs what it writes, `.metadata` too.

    Torch by itself fsyncs `.metadata` before it is flushed, when it is still empty.
    """

    def __init__(self, algorithm: HashName) -> None:
        self.algorithm = algorithm
        self.files: _Files = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Any:
        with HashedFile(Path(path), self.algorithm) as stream:
            try:
                yield stream
            except Exception as error:
                if stream.failure is None:
                    raise
                raise stream.failure from error  # torch's own says nothing of a full disk
        self.files[Path(path).name] = {"size": stream.size, "hash": stream.digest}

    def rename(self, path: Any, new_path: Any) -> None:
        os.rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """Torch's writer, into a fresh folder, through `_HashingFileSystem`."""

    def __init__(self, folder: Path, algorithm: HashName) -> None:
        super().__init__(folder, sync_files=False, overwrite=False)  # the file system itself syncs
        self.fs = _HashingFileSystem(algorithm)
        self.files = self.fs.files  # what this rank wrote, by name
