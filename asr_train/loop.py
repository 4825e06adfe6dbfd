"""The training loop: numbered stages, one screen.

Forward and backward run unit by unit; the step's loss, its gradients and the wish to stop are summed over ranks; one
host sync a step decides update or skip on all ranks together.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from asr_train import generators
from asr_train.checkpoint import Saver
from asr_train.config import Recipe
from asr_train.data.batch import Batch, input_values
from asr_train.data.corpus import Corpus
from asr_train.data.loader import RankTurns, Turn, TurnBatches, open_loader
from asr_train.data.plan import Plan
from asr_train.data.text import Normaliser
from asr_train.errors import RecipeError, TrainingError, say
from asr_train.files import append_jsonl
from asr_train.geometry import SAMPLE_RATE
from asr_train.loss import ctc_losses
from asr_train.optim import apply_schedule
from asr_train.phase import PhaseFile
from asr_train.progress import TrainingProgress
from asr_train.recipe import parse_cadence
from asr_train.run_dir import RunDir
from asr_train.score import add_metrics, evaluate_set
from asr_train.state import TrainState, due, higher_is_better
from asr_train.stop import Requests, StopFlag
from asr_train.strategy import Parallel

_MAX_NAMED = 20  # utterances named in a line about a skipped step


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one attempt works with."""

    recipe: Recipe
    run: RunDir
    attempt: int
    corpus: Corpus
    plan: Plan
    parallel: Parallel
    batches: TurnBatches
    max_steps: int
    equal_lengths: bool
    saver: Saver
    stop: StopFlag
    requests: Requests | None  # rank 0's
    phase: PhaseFile

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.parallel.rank == 0

    def forget(self, kind: str) -> None:
        """Take a request in control/ away; rank 0 does."""
        if self.requests is not None:
            self.requests.forget(kind)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; rank 0 does."""
        if self.is_main:
            self.run.log({"attempt": self.attempt, **line, "time": time.time()})


def fit(job: Job, state: TrainState, *, is_saved: bool) -> str:
    """The loop: `done` when all steps are made or no better model came for long, `stopped` when asked to.

    Args:
        job: what this attempt works with.
        state: where the run is.
        is_saved: this very state is a checkpoint already.
    """
    recipe, plan, parallel = job.recipe, job.plan, job.parallel
    clock = _Clock(state)
    saves = _Saves(job, state, is_saved=is_saved)
    parallel.module.train()  # an evaluation puts it back to this
    with (
        TrainingProgress(start_step=state.step, max_steps=job.max_steps, is_shown=job.is_main) as progress,
        _loader(job, state) as turns,
    ):
        while True:
            # 1. What is due between two steps; an evaluation that a stop came before is made up for here.
            if _evaluate_and_save(job, state, saves, progress):
                clock.restart()
            if _is_over(job, state):
                break

            # 2. Forward and backward, unit by unit; dropout and masks belong to the unit, not to the rank.
            job.phase.show("step", state.step + 1)
            clock.begin_step()
            epoch, step = state.position(plan.steps_per_epoch)
            num_utterances = plan.num_utterances_in(epoch, step)
            parallel.module.transformer_frozen = state.step < recipe.model.freeze_transformer_steps
            lr = apply_schedule(
                parallel.optimizer,
                recipe.optim,
                state.step,
                max_steps=job.max_steps,
                freeze_transformer_steps=recipe.model.freeze_transformer_steps,
            )
            totals = torch.zeros(6, dtype=torch.float64, device=parallel.device)  # as they are named in 3.
            done: list[_Done] = []
            while not (done and done[-1].turn.is_last):
                turn, batch = clock.wait_for(turns)
                job.phase.show("step", state.step + 1)
                assert (turn.epoch, turn.step) == (epoch, step), f"the loader is at {turn}, not at {(epoch, step)}"
                losses = _forward(job, turn, batch.to(parallel.device, non_blocking=True), totals, num_utterances)
                done.append(_Done(turn, batch.ids, losses))

            # 3. Sum over ranks, then update, or skip on all ranks together; one host sync.
            totals[3] += job.requests is not None and job.requests.look(job.stop)
            totals[2] += job.stop.is_set
            sums, norm, is_applied = parallel.update(totals, recipe.optim.max_grad_norm)
            loss, num_infinite, num_stops, num_saves, num_samples, num_padded_samples = sums
            state.step += 1
            state.num_infinite_losses += int(num_infinite)
            clock.end_step()

            # 4. Say what happened; stop if any rank was asked to.
            values = {"epoch": epoch, "loss": loss, "grad_norm": norm, "lr": lr}
            audio = _Audio(num_utterances, num_samples / SAMPLE_RATE, num_padded_samples / SAMPLE_RATE)
            _log_step(job, state, progress, clock, values, audio)
            if recipe.log.trained_ids:
                _write_trained_ids(job, state, epoch, done)
            _count_skip(job, state, done, progress, is_applied=is_applied)
            saves.report(progress)
            if num_stops:
                saves.save(progress, is_last=True)
                job.forget("stop")
                progress.say(f"stopped after step {state.step}, checkpoint written; the same command goes on")
                job.log({"event": "stopped", "step": state.step, "reason": job.stop.reason})
                return "stopped"
            if num_saves:
                saves.save(progress)
                job.forget("save")
    if job.is_main:
        job.run.finish(state.to_json())
        say(_spent(state))
    return "done"


def _spent(state: TrainState) -> str:
    """Where the time of a run went, start-up and lost steps left out."""
    compute_s = state.step_s - state.data_wait_s
    parts = {"training": compute_s, "waiting for data": state.data_wait_s, "evaluation": state.evaluation_s,
             "standing still for checkpoints": state.save_s}  # fmt: skip
    total_s = max(sum(parts.values()), 1e-9)
    shares = ", ".join(f"{part_s / total_s:.1%} {name}" for name, part_s in parts.items())
    return f"{timedelta(seconds=round(total_s))} in all: {shares}"


class _Saves:
    """The checkpoints of an attempt: each state once, failures counted and said."""

    def __init__(self, job: Job, state: TrainState, *, is_saved: bool) -> None:
        self._job, self._state = job, state
        self._begun = self._identity() if is_saved else None
        self._problem, self._problem_step = "", 0
        state.num_failed_saves_in_a_row = 0  # a new attempt may have a new disk

    def save(self, progress: TrainingProgress, *, is_last: bool = False) -> None:
        """Begin a checkpoint of the current state, unless it has one; every rank calls this.

        Raises:
            TrainingError: too many in a row failed, or the last one did.
        """
        job, state = self._job, self._state
        job.phase.show("checkpoint", state.step)
        job.saver.wait()  # from here on all ranks know how the one before ended
        self.report(progress)
        self._give_up(job.recipe.checkpoint.max_failed_saves)
        if self._begun == self._identity():
            return
        self._begun = self._identity()
        job.saver.save(state, score=self._score(), wait=is_last)
        if is_last:
            self.report(progress)
            self._give_up(1)

    def report(self, progress: TrainingProgress) -> None:
        """Say and count how a save ended, as soon as that is known; training goes on."""
        job, state = self._job, self._state
        result = job.saver.take_result()
        if result is None:
            return
        state.save_s += result.blocked_s
        line = {"step": result.step, "seconds": result.seconds, "blocked_s": result.blocked_s}
        if result.problem is None:
            state.num_failed_saves_in_a_row = 0
            job.log({"event": "saved", **line})
            return
        self._begun = None
        self._problem, self._problem_step = result.problem, result.step
        state.num_failed_saves += 1
        state.num_failed_saves_in_a_row += 1
        progress.say(f"the checkpoint of step {result.step} failed, those before it are untouched: {result.problem}")
        job.log({"event": "save_failed", **line, "problem": result.problem})

    def _give_up(self, limit: int) -> None:
        if self._state.num_failed_saves_in_a_row >= limit:
            raise TrainingError(
                f"the checkpoint of step {self._problem_step} could not be written to {self._job.run.checkpoints}:"
                f" {self._problem}\nThose before it are untouched; make room there, and the same command goes on from"
                " the newest."
            )

    def _identity(self) -> tuple[int, int]:
        return self._state.step, self._state.last_evaluated_step

    def _score(self) -> tuple[str, float, bool] | None:
        """What was measured at this very step, by the metric that picks the best model."""
        state = self._state
        if state.last_evaluated_step != state.step or state.last_metric is None or state.last_value is None:
            return None
        return state.last_metric, state.last_value, _more_is_better(self._job.recipe, state.last_metric)


class _Done(NamedTuple):
    """A turn that was computed: its utterances and their losses [B]."""

    turn: Turn
    ids: npt.NDArray[np.int64]
    losses: torch.Tensor


def _forward(job: Job, turn: Turn, batch: Batch, totals: torch.Tensor, num_utterances: int) -> torch.Tensor:
    """Forward and backward of one unit; adds its share of the step's loss to `totals`, returns its losses [B]."""
    parallel = job.parallel
    generators.seed(batch.seed, parallel.device)
    with parallel.unit(is_last=turn.is_last):
        with parallel.accelerator.autocast():  # FSDP2 has none of its own here, see `strategy.prepare`
            logits = parallel.model(
                input_values(batch),
                batch.num_samples,
                time_mask=batch.time_mask,
                feature_mask=batch.feature_mask,
                keep_layers=batch.keep_layers,
            )  # [B, F, V]
        losses, infinite = ctc_losses(
            logits, batch.num_frames, batch.labels, batch.num_labels, job.corpus.vocabulary.blank_id
        )
        if turn.unit is None:  # an idle turn is selected away: 0 * inf would be NaN
            losses = torch.where(torch.ones_like(infinite), torch.zeros_like(losses), losses)
            infinite = torch.zeros_like(infinite)
        loss = losses.sum() / num_utterances
        parallel.backward(loss)
    totals[0] += loss.detach()
    totals[1] += infinite.sum()
    if turn.unit is not None:  # whole numbers, which float64 sums exactly in any order
        totals[4] += batch.audio_samples
        totals[5] += len(batch.ids) * batch.padded_samples
    return losses.detach()


def _loader(job: Job, state: TrainState) -> AbstractContextManager[Iterator[tuple[Turn, Batch]]]:
    """(turn, batch) of this rank, from the run's position on."""
    epoch, step = state.position(job.plan.steps_per_epoch)
    turns = RankTurns(job.plan, job.parallel.rank, job.parallel.world_size, epoch, step)
    is_cuda = job.parallel.device.type == "cuda"
    return open_loader(job.batches, turns, num_workers=job.recipe.num_workers, pin_memory=is_cuda)


class _Clock:
    """Time of steps and of waiting for data: since the last training line, and in all."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.begin_step()
        self.restart()

    def restart(self) -> None:
        """Begin anew: after a line, and after an evaluation or a save, which are no part of a step."""
        self._start = time.monotonic()
        self.data_wait_s = 0.0
        self.num_steps = 0
        self.audio_s = 0.0

    def begin_step(self) -> None:
        """A step begins."""
        self._step_start = time.monotonic()

    def end_step(self) -> None:
        """A step is over, on the device too."""
        self._state.step_s += time.monotonic() - self._step_start

    def wait_for(self, turns: Iterator[tuple[Turn, Batch]]) -> tuple[Turn, Batch]:
        """The next turn; the wait for it is counted."""
        before = time.monotonic()
        found = next(turns)
        waited_s = time.monotonic() - before
        self.data_wait_s += waited_s
        self._state.data_wait_s += waited_s
        return found

    def read(self) -> dict[str, float]:
        """Means a step since the last line."""
        elapsed_s = time.monotonic() - self._start
        steps = max(1, self.num_steps)
        return {
            "step_time_s": elapsed_s / steps,
            "data_wait_s": self.data_wait_s / steps,
            "audio_s_per_s": self.audio_s / elapsed_s if elapsed_s > 0 else 0.0,
        }


class _Audio(NamedTuple):
    """What a step was made of, over all ranks."""

    num_utterances: int
    audio_s: float
    padded_audio_s: float


def _log_step(
    job: Job, state: TrainState, progress: TrainingProgress, clock: _Clock, values: dict[str, Any], audio: _Audio
) -> None:
    """Count the step; write a training line where one is due. Loss and counts are this step's, times are means."""
    state.num_utterances += audio.num_utterances
    state.audio_s += audio.audio_s
    clock.num_steps += 1
    clock.audio_s += audio.audio_s
    progress.advance(state.step)
    if state.step % job.recipe.log.every and state.step != job.max_steps:
        return
    line = {
        "step": state.step,
        **values,
        **audio._asdict(),
        **clock.read(),
        "num_infinite_losses": state.num_infinite_losses,
        "num_skipped_steps": state.num_skipped_steps,
    }
    job.log(line)
    job.parallel.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=state.step)
    progress.log(line)
    clock.restart()


def _count_skip(
    job: Job,
    state: TrainState,
    done: list[_Done],
    progress: TrainingProgress,
    *,
    is_applied: bool,
) -> None:
    """Count a skipped step, name the utterances with a loss that is no number, and give up after too many in a row.

    Raises:
        TrainingError: `limits.max_skipped_steps` steps were skipped in a row.
    """
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
    gathered: list[list[str]] = [mine] * job.parallel.world_size
    if job.parallel.world_size > 1:
        dist.all_gather_object(gathered, mine)
    names = sorted(name for rank_names in gathered for name in rank_names)
    cause = f"loss of {', '.join(names[:_MAX_NAMED])}" if names else "gradient"
    progress.say(f"step {state.step} skipped: the {cause} is not finite")
    job.log({"event": "skipped", "step": state.step, "ids": names, "cause": "loss" if names else "gradient"})
    limit = job.recipe.limits.max_skipped_steps
    if state.num_skipped_in_a_row >= limit:
        raise TrainingError(
            f"{limit} steps in a row were not finite, the last one step {state.step} ({cause}); checkpoints before them"
            " are kept. Try a lower optim.lr, more warm-up or bf16, or look at the utterances named in metrics.jsonl."
        )


def _write_trained_ids(job: Job, state: TrainState, epoch: int, done: list[_Done]) -> None:
    """Write which utterances this rank trained on in this step."""
    ids = [job.corpus.train.id(int(row)) for turn, rows, _ in done if turn.unit is not None for row in rows]
    line = {"attempt": job.attempt, "step": state.step, "epoch": epoch, "rank": job.parallel.rank, "ids": ids}
    append_jsonl(job.run.path / "trained_ids" / f"rank-{job.parallel.rank}.jsonl", line)


def _evaluate_and_save(job: Job, state: TrainState, saves: _Saves, progress: TrainingProgress) -> bool:
    """Evaluate and save where that is due after the steps made so far and not done yet; whether anything was."""
    recipe, steps_per_epoch = job.recipe, job.plan.steps_per_epoch
    is_due = state.step == job.max_steps or due(parse_cadence(recipe.eval.every), state.step, steps_per_epoch)
    is_evaluated = bool(recipe.eval.sets) and is_due and state.step > state.last_evaluated_step
    is_best = is_evaluated and _evaluate(job, state, progress)
    is_saving = due(parse_cadence(recipe.checkpoint.every), state.step, steps_per_epoch)
    is_last = _is_over(job, state)
    if is_saving or (is_best and recipe.checkpoint.save_best) or is_last:
        saves.save(progress, is_last=is_last)
        return True
    return is_evaluated


def _evaluate(job: Job, state: TrainState, progress: TrainingProgress) -> bool:
    """Score every set; True when the metric of `eval.best` is the best so far."""
    recipe = job.recipe
    best_metric = recipe.eval.best or f"{next(iter(recipe.eval.sets))}/wer"
    is_best = False
    for name in recipe.eval.sets:
        job.phase.show("evaluation", state.step)
        start = time.monotonic()
        rows = job.run.evaluation(state.step, name)
        score = evaluate_set(
            job.parallel.model,
            job.corpus.sets[name],
            job.corpus.vocabulary,
            Normaliser(recipe.text),
            unit_audio_s=recipe.eval.unit_audio_s,
            equal_lengths=job.equal_lengths,
            accelerator=job.parallel.accelerator,
            out=rows,
        )
        score = add_metrics(
            score,
            recipe.eval.metrics,
            rows,
            job.parallel.accelerator,
            trust_remote_code=recipe.trust_remote_code,
        )
        values = score.to_json()
        del values["confusions"]  # they can be counted from the rows, and make a long line
        line = {"step": state.step, "set": name, **values}
        elapsed_s = time.monotonic() - start
        state.evaluation_s += elapsed_s
        job.log({**line, "seconds": elapsed_s})
        job.parallel.accelerator.log({f"{name}/wer": score.wer, f"{name}/cer": score.cer}, step=state.step)
        progress.score(name, line)
        if best_metric.partition("/")[0] == name:
            measured = best_metric.partition("/")[2]
            if measured not in line:
                known = ", ".join(key for key, value in line.items() if isinstance(value, float))
                raise RecipeError(f"eval.best: {best_metric!r}: {name} was scored by: {known}")
            better = _more_is_better(recipe, measured)
            is_best = state.take_evaluation(best_metric, line[measured], higher_is_better=better)
    state.last_evaluated_step = state.step
    return is_best


def _more_is_better(recipe: Recipe, metric: str) -> bool:
    """Direction of a metric, with or without its set's name: the recipe's word, else what is known of it."""
    said = recipe.eval.higher_is_better
    return bool(higher_is_better(metric.rpartition("/")[2])) if said is None else said


def _is_over(job: Job, state: TrainState) -> bool:
    """Whether all steps are made, or early stopping ends the run."""
    patience = job.recipe.eval.early_stopping
    is_stale = patience is not None and state.num_evaluations_since_best >= patience
    return is_stale or state.step >= job.max_steps
