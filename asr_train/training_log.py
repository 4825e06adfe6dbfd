"""What an attempt writes and shows of its steps: training lines, the ledger, skipped steps, trained utterances."""

import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from asr_train.data.batch import Batch
from asr_train.data.loader import Turn
from asr_train.errors import TrainingError
from asr_train.files import append_jsonl
from asr_train.geometry import SAMPLE_RATE
from asr_train.job import Job
from asr_train.ledger import PARTS, name_of, stragglers
from asr_train.progress import TrainingProgress
from asr_train.state import TrainState

_MAX_NAMED = 20  # utterances named in a line about a skipped step


class Done(NamedTuple):
    """A turn that was computed: its utterances and their losses [B]."""

    turn: Turn
    ids: npt.NDArray[np.int64]
    losses: torch.Tensor


class Sums(NamedTuple):
    """What a step sums over ranks besides gradients, in one collective."""

    loss: float
    num_infinite: float
    num_stops: float
    num_saves: float
    num_samples: float
    num_padded_samples: float


# A rank's part of a ledger line is some 300 bytes, and whoever looks at a run reads all lines: of 64 ranks a line every
# 28 s is 2.5 MB an hour, of 512 one every 4 minutes as much. Sums go on; nothing but their resolution is lost.
_FEW_RANKS, _LEDGER_S_A_RANK = 8, 0.5


class TrainingLog:
    """Counts the steps of an attempt, and says what is due; every rank has one, rank 0's writes and shows.

    Args:
        job: what the attempt works with; its ledger is kept here.
        state: where the run is.
        progress: what a person sees.
    """

    def __init__(self, job: Job, state: TrainState, progress: TrainingProgress) -> None:
        self._job, self._state, self._progress = job, state, progress
        self._spent_before_s = Counter(state.spent_s)
        self._has_data = False
        self._hosts: list[str] = _of_all_ranks(socket.gethostname(), job.parallel.world_size)
        self._has_begun = False
        self._ledger_at = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Begin the means of the next training line: after a line, an evaluation or a save, which are in no step."""
        self._start = time.monotonic()
        self._data_wait_start_s = self._job.ledger.read()["data_wait"]
        self._num_steps = 0
        self._audio_s = 0.0

    def begin_step(self) -> None:
        """A step begins; the attempt's first ends its start-up."""
        if not self._has_begun:
            self._has_begun = True
            self.write_ledger()
            self.restart()
        self._job.ledger.begin_step()

    def next_turn(self, turns: Iterator[tuple[Turn, Batch]]) -> tuple[Turn, Batch]:
        """This rank's next turn; the wait for it is counted: the first, for workers to start, as start-up."""
        ledger = self._job.ledger
        with ledger.within("data_wait" if self._has_data else "startup"):
            turn, batch = next(turns)
        self._has_data = True
        padded_frames = int(self._job.corpus.geometry.num_frames(batch.padded_samples))
        ledger.add_unit(batch.num_frames.tolist(), padded_frames, is_idle=turn.unit is None)
        return turn, batch

    def end_step(self, sums: Sums, num_utterances: int, values: dict[str, Any]) -> None:
        """A step is over on all ranks: count it, and write a training line where one is due.

        Loss and counts are the step's, times are means since the last line.
        """
        job, state = self._job, self._state
        job.ledger.end_step(job.parallel.peer_wait.read_s())
        audio_s = sums.num_samples / SAMPLE_RATE
        state.num_infinite_losses += int(sums.num_infinite)
        state.num_utterances += num_utterances
        state.audio_s += audio_s
        self._num_steps += 1
        self._audio_s += audio_s
        self._progress.advance(state.step)
        if state.step % job.recipe.log.every and state.step != job.max_steps:
            return
        line = {
            "step": state.step,
            **values,
            "num_utterances": num_utterances,
            "audio_s": audio_s,
            "padded_audio_s": sums.num_padded_samples / SAMPLE_RATE,
            **self._means(),
            "memory_bytes": _peak_memory_bytes(job.parallel.device),
            "num_infinite_losses": state.num_infinite_losses,
            "num_skipped_steps": state.num_skipped_steps,
        }
        if job.parallel.accelerator.scaler is not None:
            line["loss_scale"] = float(job.parallel.accelerator.scaler.get_scale())
        job.log(line)
        shares = self.write_ledger(is_regular=True)
        numbers = {key: value for key, value in line.items() if key != "step"}
        tracked = {**numbers, **{f"ledger/{part}": share for part, share in shares.items()}}
        job.parallel.accelerator.log(tracked, step=state.step)
        job.prometheus.show({"step": state.step, **tracked})
        self._progress.log(line, shares)
        self.restart()

    def write_ledger(self, *, is_regular: bool = False) -> dict[str, float]:
        """Write every rank's ledger, which all ranks call for together; the shares of this attempt's time so far.

        Args:
            is_regular: it goes with a training line; of many ranks not every such line has one, see `_LEDGER_S_A_RANK`.
        """
        job = self._job
        mine = job.ledger.read()
        names = [f"{part}_s" for part in PARTS] + ["wall_s", "cost", "memory_bytes"]
        memory = _peak_memory_bytes(job.parallel.device)
        values = torch.tensor(
            [*mine.values(), job.ledger.wall_s, job.ledger.cost, memory],
            dtype=torch.float64,
            device=job.parallel.device,
        )
        gathered = values.repeat(job.parallel.world_size)
        if job.parallel.world_size > 1:
            dist.all_gather_into_tensor(gathered, values)
        ranks: list[dict[str, Any]] = [
            {
                "rank": rank,
                "host": self._hosts[rank],
                **{name: round(value, 4) for name, value in zip(names, row, strict=True)},
            }
            for rank, row in enumerate(gathered.view(-1, len(values)).tolist())
        ]
        for entry, score in zip(ranks, stragglers(ranks), strict=True):
            entry["straggler"] = score
        wait_s = _LEDGER_S_A_RANK * max(0, job.parallel.world_size - _FEW_RANKS)
        if not is_regular or time.monotonic() - self._ledger_at >= wait_s:
            self._ledger_at = time.monotonic()
            job.log({"event": "ledger", "step": self._state.step, "ranks": ranks})
        wall_s = sum(entry["wall_s"] for entry in ranks)
        return {part: sum(entry[f"{part}_s"] for entry in ranks) / wall_s for part in PARTS}

    def count_spent(self) -> None:
        """Bring the state's account of time up to date, for a checkpoint or the end."""
        self._state.spent_s = dict(self._spent_before_s + Counter(self._job.ledger.read()))

    def spent(self) -> str:
        """Where rank 0's time of all attempts went, lost steps left out."""
        self.count_spent()
        spent_s = self._state.spent_s
        total_s = max(sum(spent_s.values()), 1e-9)
        shares = ", ".join(f"{name_of(part)} {spent_s[part] / total_s:.1%}" for part in PARTS if spent_s.get(part))
        return f"{timedelta(seconds=round(total_s))} in all: {shares}"

    def count_skip(self, done: list[Done], *, is_applied: bool) -> None:
        """Count a skipped step, name the utterances with a loss that is no number, give up after too many in a row.

        Raises:
            TrainingError: `limits.max_skipped_steps` steps were skipped in a row.
        """
        job, state = self._job, self._state
        if is_applied:
            state.num_skipped_in_a_row = 0
            return
        state.num_skipped_steps += 1
        state.num_skipped_in_a_row += 1
        train = job.corpus.train
        mine = []
        for turn, ids, losses in done:
            if turn.unit is not None:
                is_bad = ~torch.isfinite(losses).cpu().numpy()
                mine += [train.id(int(row)) for row in ids[is_bad]]
        names = sorted(name for rank_names in _of_all_ranks(mine, job.parallel.world_size) for name in rank_names)
        cause = f"loss of {', '.join(names[:_MAX_NAMED])}" if names else "gradient"
        self._progress.say(f"step {state.step} skipped: the {cause} is not finite")
        job.log({"event": "skipped", "step": state.step, "ids": names, "cause": "loss" if names else "gradient"})
        limit = job.recipe.limits.max_skipped_steps
        if state.num_skipped_in_a_row >= limit:
            which = f"{limit} steps in a row were not finite, the last one" if limit > 1 else "A step was not finite:"
            raise TrainingError(
                f"{which} step {state.step} ({cause}); checkpoints before are kept. Try a lower optim.lr, more warm-up"
                " or bf16, or look at the utterances named in metrics.jsonl."
            )

    def write_trained_ids(self, epoch: int, done: list[Done]) -> None:
        """Write which utterances this rank trained on in this step, where the recipe asks for it."""
        job, rank = self._job, self._job.parallel.rank
        if not job.recipe.log.trained_ids:
            return
        ids = [job.corpus.train.id(int(row)) for turn, rows, _ in done if turn.unit is not None for row in rows]
        line = {"attempt": job.attempt, "step": self._state.step, "epoch": epoch, "rank": rank, "ids": ids}
        append_jsonl(job.run.path / "trained_ids" / f"rank-{rank}.jsonl", line)

    def _means(self) -> dict[str, float]:
        """Means a step since the last line."""
        elapsed_s = time.monotonic() - self._start
        steps = max(1, self._num_steps)
        return {
            "step_time_s": elapsed_s / steps,
            "data_wait_s": (self._job.ledger.read()["data_wait"] - self._data_wait_start_s) / steps,
            "audio_s_per_s": self._audio_s / elapsed_s if elapsed_s > 0 else 0.0,
        }


def _of_all_ranks(mine: Any, world_size: int) -> list[Any]:
    """What each rank has."""
    found: list[Any] = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(found, mine)
    return found


def _peak_memory_bytes(device: torch.device) -> int:
    """The most that this rank has used so far: of its GPU as torch allocated it, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
