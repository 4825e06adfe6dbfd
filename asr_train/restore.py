"""Go on from a checkpoint: choose it, all ranks together; load a training, or its weights alone.

What is chosen was read and compared before; what is loaded has the names, shapes and dtypes that are wanted.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asr_train import checkpoints, generators
from asr_train.checkpoint import Ranks
from asr_train.checkpoints import SHARDS, Checkpoint, generators_file
from asr_train.errors import CheckpointError, say
from asr_train.files import read_json
from asr_train.live_state import expected, fill, model_tensors
from asr_train.model import SpeechModel
from asr_train.optim import is_head
from asr_train.safe_load import load_tensors, tensors_in
from asr_train.state import TrainState
from asr_train.strategy import Parallel


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
    _restore_generators(checkpoint, ranks.rank)
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


def _restore_generators(checkpoint: Checkpoint, rank: int) -> None:
    """A rank's generators; one that was not there when it was written keeps its own."""
    name = generators_file(rank)
    if name not in checkpoint.files:
        return
    try:
        generators.set_current(read_json(checkpoint.path / name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / name} is damaged: {error}") from None
