"""One run on disk.

recipe.yaml            the resolved recipe
run.json               run id, name, recipe hash, when it was made; what `unit_audio_s: auto` was found to be
lock.json              who trains here now: host, pid, heartbeat
attempts/attempt-001.json   one life of the run: versions, git state, host, world size, strategy
outcome/attempt-001/rank-0.json   how that attempt ended, a file a rank
metrics.jsonl          training, evaluation and event lines, append-only
control/stop, control/save    made by whoever wants the training to stop, or to save and go on
checkpoints/step-0000000100/      complete under that name, or not there; see `checkpoints`
evaluations/step-0000000100/SET.jsonl   every hypothesis, worst first
trained_ids/rank-0.jsonl          which utterances each rank trained on (log.trained_ids)
trackers/              TensorBoard and others
export/                the model folder
done.json              the run is finished
"""

import os
import platform
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from asr_train.checkpoints import order
from asr_train.config import Recipe
from asr_train.errors import EXIT_FAILED, RecipeError, RunError
from asr_train.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from asr_train.lock import HeartbeatLock, LockHeldError
from asr_train.recipe import dump_recipe, identity, read_resolved, recipe_hash

START: Final = "WAVEFLEET_START"  # in the environment of ranks: who started them, by a name of theirs
_LIBRARIES = ("wavefleet", "torch", "transformers", "accelerate", "datasets", "numpy", "deepspeed")


@dataclass(frozen=True)
class RunDir:
    """Paths and files of one run directory."""

    path: Path

    @property
    def metrics(self) -> Path:
        """The append-only lines of training, evaluation and events."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of committed checkpoints."""
        return self.path / "checkpoints"

    @property
    def control(self) -> Path:
        """Requests to a live training: a file `stop` or `save` in here."""
        return self.path / "control"

    @property
    def done(self) -> Path:
        """Exists when the run is finished."""
        return self.path / "done.json"

    @property
    def run_id(self) -> str:
        """What distinguishes this run from every other."""
        return str(read_json(self.path / "run.json")["run_id"])

    def recipe(self) -> Recipe:
        """The resolved recipe that this run was started with.

        Raises:
            RunError: the folder is no run directory.
            RecipeError: its recipe.yaml is damaged, or of another version.
        """
        path = self.path / "recipe.yaml"
        if not path.exists():
            raise RunError(f"{self.path} is no run directory: it has no recipe.yaml")
        return read_resolved(path)

    def evaluation(self, step: int, set_name: str) -> Path:
        """File of the hypotheses of one evaluation."""
        return self.path / "evaluations" / f"step-{step:010d}" / f"{set_name}.jsonl"

    def lock(self) -> HeartbeatLock:
        """The lock that keeps a second training out; see `locked_message` for what the user reads."""
        return HeartbeatLock(self.path / "lock.json")

    def make(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            RunError: a file is in the way, or it may not be made there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"run_dir: {self.path} cannot be made: {error}; choose another") from None

    def claim(self, recipe: Recipe, *, allow_change: bool = False) -> Recipe:
        """Make this the directory of `recipe`, or check that it is already; the recipe that the run goes on with.

        What does not define the run (logging, evaluation, checkpoint cadence) is taken from the new recipe. Where it
        says `unit_audio_s: auto`, the number that was found in this run takes its place.

        Raises:
            RunError: it holds another run; lists what differs.
        """
        identity_file = self.path / "run.json"
        if identity_file.exists():
            recipe = self.with_found_unit(recipe)
            self._check_same(recipe, allow_change=allow_change)
        elif any(self.path.glob("checkpoints/step-*")):
            raise RunError(
                f"{self.path} holds checkpoints but no run.json; choose another run_dir, or restore the file"
            )
        else:
            write_json(
                identity_file,
                {
                    "run_id": uuid.uuid4().hex[:12],
                    "name": recipe.name,
                    "recipe_hash": recipe_hash(recipe),
                    "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                },
            )
        write_text(self.path / "recipe.yaml", dump_recipe(recipe))
        return recipe

    def settle_unit(self, recipe: Recipe, unit_audio_s: float, **about: Any) -> None:
        """Write what `unit_audio_s: auto` was found to be: for good, as the plan of the data follows from it.

        The run stays known by the recipe as it was written, its name and hash; `recipe.yaml` has the number.
        """
        path = self.path / "run.json"
        write_json(path, {**read_json(path), "unit_audio_s": unit_audio_s, "unit_audio_s_found": about})
        write_text(self.path / "recipe.yaml", dump_recipe(replace(recipe, unit_audio_s=unit_audio_s)))

    def with_found_unit(self, recipe: Recipe) -> Recipe:
        """The recipe with what `unit_audio_s: auto` was found to be in this run; as it is, where it was not."""
        path = self.path / "run.json"
        found = read_json(path).get("unit_audio_s") if path.exists() else None
        return recipe if found is None or recipe.unit_audio_s != "auto" else replace(recipe, unit_audio_s=found)

    def _check_same(self, recipe: Recipe, *, allow_change: bool) -> None:
        try:
            old = identity(self.recipe())
        except RecipeError as error:
            raise RunError(f"{self.path / 'recipe.yaml'} cannot be read by this version:\n{error}") from None
        new = identity(recipe)
        changed = [key for key in new if old.get(key) != new[key]]
        if changed and not allow_change:
            listed = "".join(f"\n  {key}: {old.get(key)!r} -> {new[key]!r}" for key in changed)
            raise RunError(
                f"{self.path} holds a run of another recipe:{listed}\n"
                "Choose another run_dir, go back to the old values, or take the change with --allow-change."
            )
        if changed:
            self.done.unlink(missing_ok=True)
        if "unit_audio_s" in changed:  # a number that was found counts no more
            about = read_json(self.path / "run.json")
            kept = {key: value for key, value in about.items() if not key.startswith("unit_audio_s")}
            write_json(self.path / "run.json", kept)

    def newest_attempt(self) -> int:
        """Number of the newest attempt, 0 when there was none."""
        return max(
            (int(path.stem.split("-")[1]) for path in (self.path / "attempts").glob("attempt-*.json")), default=0
        )

    def start_attempt(self, facts: Mapping[str, Any]) -> int:
        """Number this life of the run, and write what it runs with; for one process, the lock's holder."""
        attempt = self.newest_attempt() + 1
        start = os.environ.get(START)
        record = {"attempt": attempt, "start": start, "started": time.time(), **environment(), **facts}
        write_json(self._attempt_file(attempt), record)
        return attempt

    def note(self, attempt: int, **facts: Any) -> None:
        """Add to what is written of an attempt; for the process that started it."""
        path = self._attempt_file(attempt)
        write_json(path, {**read_json(path), **facts})

    def attempt_record(self, attempt: int) -> dict[str, Any]:
        """What is written of an attempt: world size, versions, `resumed_from`, `committed`."""
        record: dict[str, Any] = read_json(self._attempt_file(attempt))
        return record

    def failures(self, recipe: Recipe) -> dict[int, int]:
        """Step of a checkpoint -> attempts from there that failed by themselves with nothing new saved.

        An attempt counts when a rank wrote an error that is its own: not one that was ended from outside, by a signal,
        a time limit or a lost node, nor one that a mistake in the recipe ended, nor those of another recipe. What an
        attempt saves at a step that an earlier one had reached is nothing new.
        """
        found: dict[int, int] = {}
        reached = 0
        for number in range(1, self.newest_attempt() + 1):
            try:
                record = self.attempt_record(number)
            except (OSError, ValueError):
                continue
            before = reached
            reached = max(reached, _step_of(record.get("resumed_from")), _step_of(record.get("committed")))
            is_same = record.get("recipe_hash") == recipe_hash(recipe)
            if record.get("resumed_from") is None or _step_of(record.get("committed")) > before or not is_same:
                continue
            if any(_failed_by_itself(outcome) for outcome in self.outcomes(number).values()):
                step = _step_of(record["resumed_from"])
                found[step] = found.get(step, 0) + 1
        return found

    def outcomes(self, attempt: int | None = None) -> dict[int, dict[str, Any]]:
        """Rank -> how it ended, for the ranks of an attempt that could write it; of the newest one by default."""
        number = self.newest_attempt() if attempt is None else attempt
        found = {}
        for path in sorted((self.path / "outcome" / f"attempt-{number:03d}").glob("rank-*.json")):
            with suppress(OSError, ValueError):  # torn by a full disk
                found[int(path.stem.removeprefix("rank-"))] = read_json(path)
        return found

    def _attempt_file(self, attempt: int) -> Path:
        return self.path / "attempts" / f"attempt-{attempt:03d}.json"

    def write_outcome(self, attempt: int, rank: int, outcome: Mapping[str, Any]) -> None:
        """Write how this rank's part of an attempt ended: status, exit_code, message, step."""
        path = self.path / "outcome" / f"attempt-{attempt:03d}" / f"rank-{rank}.json"
        write_json(path, {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **outcome})

    def finish(self, state: Mapping[str, Any]) -> None:
        """Mark the run as done."""
        write_json(self.done, dict(state))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        append_jsonl(self.metrics, dict(record))


def locked_message(run: RunDir, error: LockHeldError) -> str:
    """What a user reads who starts a run that is already running."""
    held = error.holder
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held.get("since", 0)))
    who = f"pid {held.get('pid')} on {held.get('host')}, since {since}"
    return f"{run.path} is being trained by {who}; nothing was started"


def read_metrics(run: RunDir) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, for each step (and set) the last attempt that ran it; event lines are left out.

    What an attempt did beyond the checkpoint that the next one started from is no part of the run.
    """
    yield from kept_lines(read_jsonl(run.metrics))


def kept_lines(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of the lines of metrics.jsonl, in their order, those that `read_metrics` gives."""
    last: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        if line.get("event") in ("started", "restored"):
            last = {key: kept for key, kept in last.items() if key[0] <= line["step"]}
        elif "event" not in line:
            last[line["step"], line.get("set", "")] = line
    yield from sorted(last.values(), key=lambda line: (line["step"], line.get("set", "")))


def _step_of(checkpoint: str | None) -> int:
    """Step of a checkpoint's name; 0 for none."""
    return 0 if checkpoint is None else max(0, order(checkpoint)[0])


def _failed_by_itself(outcome: Mapping[str, Any]) -> bool:
    return (
        outcome.get("status") == "failed" and outcome.get("exit_code") == EXIT_FAILED and not outcome.get("lost_peer")
    )


def environment() -> dict[str, Any]:
    """Host, library versions and the state of the code; no environment variables, for they may hold secrets."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": library_versions(),
        "git": _git_state(),
    }


def library_versions() -> dict[str, str]:
    """Name -> version of the libraries that a training depends on."""
    versions = {}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_state() -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes, when the code runs from a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
