"""The training loop: numbered stages, one screen.

Forward and backward run unit by unit; the step's loss, its gradients and the wish to stop are summed over ranks; one
host sync a step decides update or skip on all ranks together.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch

from asr_train import generators
from asr_train.config import Recipe
from asr_train.data.batch import Batch, input_values
from asr_train.data.loader import RankTurns, Turn, open_loader
from asr_train.data.text import Normaliser
from asr_train.errors import RecipeError, TrainingError, say
from asr_train.geometry import SAMPLE_RATE
from asr_train.job import Job
from asr_train.loss import ctc_losses
from asr_train.memory_error import names_what_was_too_large
from asr_train.optim import apply_schedule
from asr_train.progress import TrainingProgress
from asr_train.recipe import parse_cadence
from asr_train.score import add_metrics, evaluate_set
from asr_train.state import TrainState, due, higher_is_better
from asr_train.training_log import Done, Sums, TrainingLog

_MAX_NAMED = 5  # utterances of a unit that was too large


def fit(job: Job, state: TrainState, *, is_saved: bool) -> str:
    """The loop: `done` when all steps are made or no better model came for long, `stopped` when asked to.

    Args:
        job: what this attempt works with.
        state: where the run is.
        is_saved: this very state is a checkpoint already.
    """
    recipe, plan, parallel = job.recipe, job.plan, job.parallel
    with (
        TrainingProgress(start_step=state.step, max_steps=job.max_steps, is_shown=job.is_main) as progress,
        _loader(job, state) as turns,
    ):
        log = TrainingLog(job, state, progress)
        saves = _Saves(job, state, log, progress, is_saved=is_saved)
        parallel.module.train()
        while True:
            # 1. What is due between two steps; an evaluation that a stop came before is made up for here.
            if _evaluate_and_save(job, state, saves, progress):
                log.write_ledger()  # so that what it took is told from the steps after it, which may be lost
                log.restart()
            if _is_over(job, state):
                break

            # 2. Forward and backward, unit by unit; dropout and masks belong to the unit, not to the rank.
            job.phase.show("step", state.step + 1)
            log.begin_step()
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
            totals = torch.zeros(len(Sums._fields), dtype=torch.float64, device=parallel.device)
            done: list[Done] = []
            while not (done and done[-1].turn.is_last):
                turn, batch = log.next_turn(turns)
                job.phase.show("step", state.step + 1)
                assert (turn.epoch, turn.step) == (epoch, step), f"the loader is at {turn}, not at {(epoch, step)}"
                with names_what_was_too_large(recipe, partial(_named_unit, job, state, turn, batch)):
                    losses = _forward(job, turn, batch.to(parallel.device, non_blocking=True), totals, num_utterances)
                done.append(Done(turn, batch.ids, losses))

            # 3. Sum over ranks, then update, or skip on all ranks together; one host sync.
            totals[3] += job.requests is not None and job.requests.look(job.stop)
            totals[2] += job.stop.is_set
            with names_what_was_too_large(recipe, partial("the update of step {}".format, state.step + 1)):
                values, norm, is_applied = parallel.update(totals, recipe.optim.max_grad_norm)
            sums = Sums(*values)
            state.step += 1

            # 4. Say what happened; stop if any rank was asked to.
            log.end_step(sums, num_utterances, {"epoch": epoch, "loss": sums.loss, "grad_norm": norm, "lr": lr})
            log.write_trained_ids(epoch, done)
            log.count_skip(done, is_applied=is_applied)
            saves.report()
            if sums.num_stops:
                saves.save(is_last=True)
                job.forget("stop")
                progress.say(f"stopped after step {state.step}, checkpoint written; the same command goes on")
                job.log({"event": "stopped", "step": state.step, "reason": job.stop.reason})
                log.write_ledger()
                return "stopped"
            if sums.num_saves:
                saves.save()
                job.forget("save")
    if job.is_main:
        said = log.spent()
        job.run.finish(state.to_json())
        say(said)
    return "done"


class _Saves:
    """The checkpoints of an attempt: each state once, failures counted and said."""

    def __init__(
        self, job: Job, state: TrainState, log: TrainingLog, progress: TrainingProgress, *, is_saved: bool
    ) -> None:
        self._job, self._state, self._log, self._progress = job, state, log, progress
        self._begun = self._identity() if is_saved else None
        self._problem, self._problem_step = "", 0
        state.num_failed_saves_in_a_row = 0  # a new attempt may have a new disk

    def save(self, *, is_last: bool = False) -> None:
        """Begin a checkpoint of the current state, unless it has one; every rank calls this.

        Raises:
            TrainingError: too many in a row failed, or the last one did.
        """
        job, state = self._job, self._state
        job.phase.show("checkpoint", state.step)
        with job.ledger.within("checkpoint"):
            job.saver.wait()  # from here on all ranks know how the one before ended
            self.report()
            self._give_up(job.recipe.checkpoint.max_failed_saves)
            if self._begun == self._identity():
                return
            self._begun = self._identity()
            self._log.count_spent()
            job.saver.save(state, score=self._score(), wait=is_last)
            if is_last:
                self.report()
                self._give_up(1)

    def report(self) -> None:
        """Say and count how a save ended, as soon as that is known; training goes on."""
        job, state = self._job, self._state
        result = job.saver.take_result()
        if result is None:
            return
        line = {"step": result.step, "seconds": result.seconds, "blocked_s": result.blocked_s}
        if result.problem is None:
            state.num_failed_saves_in_a_row = 0
            job.log({"event": "saved", **line})
            return
        self._begun = None
        self._problem, self._problem_step = result.problem, result.step
        state.num_failed_saves += 1
        state.num_failed_saves_in_a_row += 1
        self._progress.say(
            f"the checkpoint of step {result.step} failed, those before it are untouched: {result.problem}"
        )
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
                is_padded=batch.is_padded,
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


def _named_unit(job: Job, state: TrainState, turn: Turn, batch: Batch) -> str:
    """A unit for a message: where it is in the plan, how large it is, and its first utterances."""
    count, padded_s = len(batch.ids), batch.padded_samples / SAMPLE_RATE
    ids = ", ".join(job.corpus.train.id(int(row)) for row in batch.ids[:_MAX_NAMED])
    place = "an idle turn" if turn.unit is None else f"unit {turn.unit}"
    return (
        f"{place} of step {state.step + 1} (epoch {turn.epoch}, its step {turn.step}) on rank {job.parallel.rank}: "
        f"{count} utterances padded to {padded_s:.2f} s, {count * padded_s:.1f} s in all, {ids}"
        f"{', ...' if count > _MAX_NAMED else ''}"
    )


def _loader(job: Job, state: TrainState) -> AbstractContextManager[Iterator[tuple[Turn, Batch]]]:
    """(turn, batch) of this rank, from the run's position on."""
    epoch, step = state.position(job.plan.steps_per_epoch)
    turns = RankTurns(job.plan, job.parallel.rank, job.parallel.world_size, epoch, step)
    is_cuda = job.parallel.device.type == "cuda"
    return open_loader(job.batches, turns, num_workers=job.recipe.num_workers, pin_memory=is_cuda)


def _evaluate_and_save(job: Job, state: TrainState, saves: _Saves, progress: TrainingProgress) -> bool:
    """Evaluate and save where that is due after the steps made so far and not done yet; whether anything was."""
    recipe, steps_per_epoch = job.recipe, job.plan.steps_per_epoch
    is_due = state.step == job.max_steps or due(parse_cadence(recipe.eval.every), state.step, steps_per_epoch)
    is_evaluated = bool(recipe.eval.sets) and is_due and state.step > state.last_evaluated_step
    is_best = False
    if is_evaluated:
        with job.ledger.within("evaluation"):
            is_best = _evaluate(job, state, progress)
        job.parallel.module.train()  # here and not in each step, for it walks over all modules
    is_saving = due(parse_cadence(recipe.checkpoint.every), state.step, steps_per_epoch)
    is_last = _is_over(job, state)
    if is_saving or (is_best and recipe.checkpoint.save_best) or is_last:
        saves.save(is_last=is_last)
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
        job.log({**line, "seconds": time.monotonic() - start})
        job.parallel.accelerator.log({f"{name}/wer": score.wer, f"{name}/cer": score.cer}, step=state.step)
        job.prometheus.show({"wer": score.wer, "cer": score.cer}, evaluated=name)
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
