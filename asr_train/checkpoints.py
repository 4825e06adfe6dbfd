"""Checkpoints on disk: which there are, whether they are whole, which to go on from, which to keep. No torch.

    checkpoints/step-0000000100/        complete under that name, or not there
        MANIFEST.json                   every file with size and hash; what the checkpoint belongs to; hash of itself
        state.json                      position, best metrics, GradScaler
        generators/rank-0.json          random generators, for what no unit seeds
        shards/                         torch's distributed format: model and optimizer
    checkpoints/.staging-003-…/         being written by attempt 3
    checkpoints/.trash-…/               being deleted
    checkpoints/.quarantine/…/          found damaged; REASON.json says how

A checkpoint written again at the same step, after a late evaluation say, is a new folder `step-0000000100.1`.
"""

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from asr_train.errors import CheckpointError
from asr_train.files import file_hash, fsync_dir, hash_json, read_json, write_json

MANIFEST: Final = "MANIFEST.json"
STATE: Final = "state.json"
SHARDS: Final = "shards"
GENERATORS: Final = "generators"
QUARANTINE: Final = ".quarantine"
_NAME = re.compile(r"step-(\d{10})(?:\.(\d+))?")
_STAGING = re.compile(r"\.staging-(\d+)-.*")


@dataclass(frozen=True)
class Checkpoint:
    """A folder under a checkpoint's name, and its manifest where that can be read.

    Attributes:
        problem: why it cannot be whole, from names and sizes alone; None when nothing speaks against it.
    """

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def name(self) -> str:
        """`step-0000000100`."""
        return self.path.name

    @property
    def step(self) -> int:
        """Updates of the run when it was written."""
        return order(self.name)[0]

    @property
    def size_bytes(self) -> int:
        """All files that the manifest names."""
        return sum(int(entry["size"]) for entry in self.files.values())

    @property
    def files(self) -> Mapping[str, Any]:
        """Relative path -> size and hash."""
        found: dict[str, Any] = self.manifest.get("files", {})
        return found

    @property
    def score(self) -> tuple[str, float, bool] | None:
        """Metric that picks the best model, its value at this step, and whether more is better."""
        score = self.manifest.get("score")
        return None if score is None else (score["metric"], score["value"], score["higher_is_better"])

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json: `train` and `scaler`.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            content: dict[str, Any] = read_json(self.path / STATE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / STATE} is damaged: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("train"), dict) or "scaler" not in content:
            raise CheckpointError(f"{self.path / STATE} is damaged: it holds no state of a training")
        return content


def order(name: str) -> tuple[int, int]:
    """(step, revision) of a checkpoint's name; names that are none have step -1."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def name_for(folder: Path, step: int) -> str:
    """An unused name for a checkpoint of a step."""
    name = f"step-{step:010d}"
    taken = [order(path.name)[1] for path in folder.glob(f"{name}*") if order(path.name)[0] == step]
    return f"{name}.{max(taken) + 1}" if taken else name


def generators_file(rank: int) -> str:
    """Where a rank's random generators are in a checkpoint."""
    return f"{GENERATORS}/rank-{rank}.json"


def staging_name(attempt: int) -> str:
    """An unused name for a checkpoint being written."""
    return f".staging-{attempt:03d}-{uuid.uuid4().hex[:8]}"


def found(folder: Path) -> list[Checkpoint]:
    """Every folder under a checkpoint's name, oldest first, whole or not."""
    paths = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    return [open_checkpoint(path) for path in sorted(paths, key=lambda path: order(path.name))]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder; looks at its manifest and the sizes of its files, not into them."""
    try:
        manifest = read_json(path / MANIFEST)
        said = manifest.pop("manifest_hash")
        if said != hash_json(manifest):
            return Checkpoint(path, problem=f"{MANIFEST} is damaged: it does not have the hash that it names")
        if _NAME.fullmatch(path.name) and int(manifest["step"]) != order(path.name)[0]:
            return Checkpoint(path, problem=f"{MANIFEST} is that of step {manifest['step']}")
    except OSError as error:
        return Checkpoint(path, problem=f"{MANIFEST}: {error.strerror}")
    except (ValueError, TypeError, KeyError, AttributeError):
        return Checkpoint(path, problem=f"{MANIFEST} is damaged")
    checkpoint = Checkpoint(path, manifest)
    problems = [problem for name in checkpoint.files if (problem := _wrong_size(checkpoint, name))]
    return Checkpoint(path, manifest, "; ".join(problems) or None)


def _wrong_size(checkpoint: Checkpoint, name: str) -> str | None:
    try:
        size = (checkpoint.path / name).stat().st_size
    except OSError as error:
        return f"{name}: {error.strerror}"
    expected = checkpoint.files[name]["size"]
    return None if size == expected else f"{name} has {size:,} bytes, and {expected:,} were written"


def whole(folder: Path) -> list[Checkpoint]:
    """Checkpoints of which nothing is missing, oldest first."""
    return [checkpoint for checkpoint in found(folder) if checkpoint.problem is None]


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of which nothing is missing, or None when there never was any.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
    """
    if candidates := whole(folder):
        return candidates[-1]
    check_start_from_nothing(folder)
    return None


def best(folder: Path) -> Checkpoint | None:
    """The checkpoint with the best score, the earlier of equals; the newest one when none was scored."""
    last = newest(folder)
    ranked = _ranked(whole(folder))
    return max(ranked, key=lambda entry: entry[0])[1] if ranked else last


def _ranked(candidates: Sequence[Checkpoint]) -> list[tuple[tuple[float, int, int], Checkpoint]]:
    """Scored checkpoints with a key that grows with how good they are; of the newest metric only."""
    scored = [(checkpoint, checkpoint.score) for checkpoint in candidates]
    metric = next((score[0] for _, score in reversed(scored) if score), None)
    return [
        ((score[1] if score[2] else -score[1], -checkpoint.step, order(checkpoint.name)[1]), checkpoint)
        for checkpoint, score in scored
        if score is not None and score[0] == metric
    ]


def check_start_from_nothing(folder: Path) -> None:
    """Refuse to start from step 0 where checkpoints were; for when none of them can be used.

    Raises:
        CheckpointError: with what there is, and what to do.
    """
    broken = [f"\n  {checkpoint.name}: {checkpoint.problem}" for checkpoint in found(folder)]
    for path in sorted((folder / QUARANTINE).glob("*")):
        broken.append(f"\n  {QUARANTINE}/{path.name}: {reason(path)}")
    if broken:
        raise CheckpointError(
            f"{folder} holds no checkpoint that can be used:{''.join(broken)}\n"
            "Nothing was overwritten. Bring a whole one back, or move this folder away to start from step 0."
        )


def problems_in(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Read files of a checkpoint again and compare them with its manifest; what is wrong with each."""
    algorithm = checkpoint.manifest["hash"]
    problems = []
    for name in names:
        if problem := _wrong_size(checkpoint, name):
            problems.append(problem)
            continue
        try:
            is_same = file_hash(checkpoint.path / name, algorithm) == checkpoint.files[name]["hash"]
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if not is_same:
            problems.append(f"{name} is not what was written: its {algorithm} differs")
    return problems


def verify(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, every byte compared with its manifest; `problem` says what differs."""
    if checkpoint.problem is not None:
        return checkpoint
    problems = problems_in(checkpoint, checkpoint.files)
    return Checkpoint(checkpoint.path, checkpoint.manifest, "; ".join(problems) or None)


def share(checkpoint: Checkpoint, rank: int, world_size: int) -> list[str]:
    """The files that a rank verifies, about as many bytes for each rank."""
    load = [0] * world_size
    mine = []
    for name, entry in sorted(checkpoint.files.items(), key=lambda item: (-int(item[1]["size"]), item[0])):
        least = load.index(min(load))
        load[least] += int(entry["size"]) + 4096  # small files cost an opening
        if least == rank:
            mine.append(name)
    return mine


def quarantine(checkpoint: Checkpoint, why: str) -> Path:
    """Set a damaged checkpoint aside, with the reason beside it; one process calls this."""
    aside = checkpoint.path.parent / QUARANTINE / f"{checkpoint.name}-{uuid.uuid4().hex[:8]}"
    aside.parent.mkdir(exist_ok=True)
    os.rename(checkpoint.path, aside)
    fsync_dir(aside.parent)
    fsync_dir(checkpoint.path.parent)
    write_json(aside / "REASON.json", {"reason": why, "time": time.time()})
    return aside


def reason(path: Path) -> str:
    """Why a quarantined checkpoint is there."""
    try:
        return str(read_json(path / "REASON.json")["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return "no reason was written"


def kept(candidates: Sequence[Checkpoint], *, last: int, best: int, every: int | None) -> list[Checkpoint]:
    """Which whole checkpoints to keep, oldest first.

    Args:
        candidates: whole ones, oldest first.
        last: the newest so many.
        best: and those with the best so many scores.
        every: and those whose step it divides.
    """
    latest = {checkpoint.step: checkpoint for checkpoint in candidates}  # of several of one step the newest
    single = sorted(latest.values(), key=lambda checkpoint: order(checkpoint.name))
    ranked = sorted(_ranked(single), key=lambda entry: entry[0])
    names = {checkpoint.name for checkpoint in single[-last:]}
    names |= {checkpoint.name for _, checkpoint in ranked[len(ranked) - min(best, len(ranked)) :]}
    if every is not None:
        names |= {checkpoint.name for checkpoint in single if checkpoint.step % every == 0}
    return [checkpoint for checkpoint in single if checkpoint.name in names]


def remove(path: Path) -> None:
    """Delete a folder of checkpoints/: out of the way first, so that no half deleted one has a checkpoint's name."""
    if not path.name.startswith(".trash-"):
        trash = path.with_name(f".trash-{path.name.lstrip('.')}-{uuid.uuid4().hex[:8]}")
        os.rename(path, trash)
        fsync_dir(trash.parent)
        path = trash
    shutil.rmtree(path)


def remove_leftovers(folder: Path, attempt: int) -> None:
    """Delete what earlier attempts left half written or half deleted; for the holder of the run's lock.

    The lock says that those attempts are dead; staging folders of this attempt or a later one are nobody's business.
    """
    for path in folder.glob(".trash-*"):
        shutil.rmtree(path)
    for path in folder.glob(".staging-*"):
        number = _STAGING.fullmatch(path.name)
        if number is None or int(number[1]) < attempt:
            remove(path)
