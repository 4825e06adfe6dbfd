"""Save and restore a training: stage, hash, commit, verify; then restore what is verified, or the one before it.

A checkpoint is written into a fresh folder by all ranks, each file hashed while it is written and fsynced; the ranks
tell each other what they wrote, rank 0 writes the manifest and gives the folder its name. Then all of it is read
again, and only when it is right are older ones deleted. All of this goes over a gloo group of its own, in a thread of
its own when the recipe says so, so that it never meets the loop's collectives.

`checkpoints` says what is on disk.
"""

import base64
import json
import os
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from asr_train import checkpoints
from asr_train.checkpoints import MANIFEST, SHARDS, STATE, Checkpoint
from asr_train.config import CheckpointSettings
from asr_train.errors import CheckpointError, TrainingError, say
from asr_train.files import HashedFile, HashName, fsync_dir, hash_json
from asr_train.live_state import Snapshots, expected, fill, model_tensors, written_here
from asr_train.model import SpeechModel
from asr_train.optim import is_head
from asr_train.safe_load import causes, load_tensors, tensors_in
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
        plain = _Plain(state.step, json.dumps(content, indent=2), json.dumps(_generators()), score)
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
            folder = staging / "generators"
            folder.mkdir(exist_ok=True)
            name = f"rank-{self.ranks.rank}.json"
            files[f"generators/{name}"] = _write_text(folder / name, plain.generators, algorithm)
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
        for folder in (staging / SHARDS, staging / "generators", staging):
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


def choose(
    folder: Path,
    ranks: Ranks,
    *,
    failures: Mapping[int, int] | None = None,
    max_failures: int = 3,
    tell: Callable[[str], None] = say,
) -> Checkpoint | None:
    """The checkpoint to go on from, read and compared by all ranks together; None where there never was one.

    The newest one that is whole. Those that are not are set aside with the reason. One from which several attempts
    failed by themselves is passed over once, in favour of the one before.

    Args:
        folder: the run's folder of checkpoints.
        ranks: all of them.
        failures: on rank 0, a checkpoint's step -> attempts from it that failed by themselves with nothing new saved.
        max_failures: so many are too many.
        tell: says something to the user, on rank 0.

    Raises:
        CheckpointError: there are checkpoints and none can be used, or attempts fail from two of them.
    """
    failed = ranks.from_rank_0(lambda: dict(failures or {}))
    passed_over: Checkpoint | None = None
    for candidate in reversed(ranks.from_rank_0(lambda: checkpoints.found(folder))):
        problem = candidate.problem
        if problem is None:
            mine = checkpoints.share(candidate, ranks.rank, ranks.world_size)
            told = ranks.gather("; ".join(checkpoints.problems_in(candidate, mine)))
            problem = "; ".join(text for text in told if text) or None
        if problem is None:
            problem = ranks.from_rank_0(partial(_unreadable, candidate))
        if problem is not None:
            ranks.from_rank_0(partial(checkpoints.quarantine, candidate, problem))
            if ranks.rank == 0:
                tell(f"{candidate.name} is not whole, and was set aside in {checkpoints.QUARANTINE}/: {problem}")
            continue
        if failed.get(candidate.step, 0) < max_failures:
            return candidate
        if passed_over is not None:
            raise CheckpointError(
                f"{max_failures} attempts failed from {passed_over.name}, and as many from {candidate.name}, each with"
                " an error and nothing new saved: this is not the checkpoint's doing. The errors stand in outcome/ of"
                f" the run directory. When the cause is removed, go on with {_more(failed, candidate)}."
            )
        passed_over = candidate
        if ranks.rank == 0:
            tell(f"{max_failures} attempts failed from {candidate.name}; going on from the one before it")
    if passed_over is not None:
        raise CheckpointError(
            f"{max_failures} attempts failed from {passed_over.name}, each with an error and nothing new saved, and"
            f" {folder} holds none before it. The errors stand in outcome/ of the run directory. When the cause is"
            f" removed, go on with {_more(failed, passed_over)}."
        )
    ranks.from_rank_0(lambda: checkpoints.check_start_from_nothing(folder))
    return None


def _unreadable(checkpoint: Checkpoint) -> str | None:
    """What keeps a checkpoint from being used although its files are those of its manifest: a program in it, say."""
    try:
        tensors_in(checkpoint.path / SHARDS)
        TrainState.from_json(checkpoint.state["train"])
    except CheckpointError as error:
        return str(error)
    return None


def _more(failed: Mapping[int, int], checkpoint: Checkpoint) -> str:
    return f"checkpoint.max_failed_attempts={failed[checkpoint.step] + 1}"


def restore(checkpoint: Checkpoint, parallel: Parallel, ranks: Ranks, facts: Mapping[str, Any]) -> TrainState:
    """Load model, optimizer, GradScaler, generators and position; every rank calls this, at any world size.

    Args:
        checkpoint: what `choose` gave.
        parallel: what is trained.
        ranks: all of them.
        facts: what this training is, as for `Saver`.

    Raises:
        CheckpointError: it belongs to another corpus or plan, or to a model with other names, shapes or dtypes.
    """
    check_belongs(checkpoint, facts)
    shards = checkpoint.path / SHARDS
    _check_tensors(checkpoint, expected(parallel))
    fill(parallel, partial(load_tensors, folder=shards, group=ranks.group, no_dist=ranks.world_size == 1))
    content = checkpoint.state
    scaler = parallel.accelerator.scaler
    if scaler is not None and content["scaler"]:
        scaler.load_state_dict(content["scaler"])  # after the optimizer
    _restore_generators(checkpoint, ranks)
    return TrainState.from_json(content["train"])


def check_belongs(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run, corpus or plan.

    Raises:
        CheckpointError: says which differ.
    """
    if checkpoint.manifest.get("run_id") != facts.get("run_id"):
        raise CheckpointError(
            f"{checkpoint.path} is a checkpoint of another run: {checkpoint.manifest.get('run_id')}, and this is"
            f" {facts['run_id']}. Take it away; to start from its weights, name it as model.init_from."
        )
    keys = {"corpus_hash": "corpus", "plan_hash": "plan of the data"}
    differ = [key for key in keys if checkpoint.manifest.get(key) != facts[key]]
    if differ:
        listed = "".join(f"\n  {keys[key]}: {checkpoint.manifest.get(key)} -> {facts[key]}" for key in differ)
        raise CheckpointError(
            f"{checkpoint.path} was written for another {' and another '.join(keys[key] for key in differ)}; going on"
            f" would repeat and leave out utterances.{listed}\nBring the corpus back, or choose another run_dir."
        )


def load_weights(checkpoint: Checkpoint, model: SpeechModel, *, may_resize_head: bool = False) -> bool:
    """Load a checkpoint's weights into an unwrapped model, in one process, whatever wrote it.

    Args:
        checkpoint: a verified one.
        model: whose weights are replaced.
        may_resize_head: a CTC head for another vocabulary is no error: the model keeps its own.

    Returns:
        whether the model kept its own head.

    Raises:
        CheckpointError: damaged, or of a model with other names, shapes or dtypes.
    """
    weights = model_tensors(model)
    resized: list[str] = []
    if may_resize_head:
        there = tensors_in(checkpoint.path / SHARDS)
        resized = [name for name in weights if is_head(name) and there.get(name, (None,))[0] != weights[name].shape]
    for name in resized:
        del weights[name]
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    _check_tensors(checkpoint, wanted, ignored=resized)
    load_tensors(weights, folder=checkpoint.path / SHARDS, group=None, no_dist=True)
    return bool(resized)


def _check_tensors(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]], ignored: Sequence[str] = ()
) -> None:
    """Compare names, shapes and dtypes before anything is loaded: torch would cast silently."""
    there = tensors_in(checkpoint.path / SHARDS)
    wrong = [f"{name} is missing" for name in wanted if name not in there]
    for name, (shape, dtype) in wanted.items():
        if name in there and there[name] != (shape, dtype):
            wrong.append(f"{name} is {_described(*there[name])}, and {_described(shape, dtype)} here")
    parts = {name.partition(".")[0] for name in wanted}
    extra = [name for name in there if name not in (*wanted, *ignored) and name.partition(".")[0] in parts]
    wrong += [f"{name} has no place here" for name in extra]
    if wrong:
        listed = "".join(f"\n  {text}" for text in wrong[:20])
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(f"{checkpoint.path} is of another model; nothing was loaded:{listed}{more}")


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


# --- generators ---------------------------------------------------------------------------------------------------


def _generators() -> dict[str, Any]:
    """State of this process's random generators, as JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": _encoded(torch.get_rng_state()),
        "cuda": _encoded(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, gauss],
    }


def _restore_generators(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """This rank's generators; a rank that was not there when it was written keeps its own.

    Raises:
        CheckpointError: they are damaged.
    """
    path = checkpoint.path / "generators" / f"rank-{ranks.rank}.json"
    if f"generators/{path.name}" not in checkpoint.files:
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        torch.set_rng_state(_decoded(saved["torch"]))
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_decoded(saved["cuda"]))
        version, internal, gauss = saved["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = saved["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


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
