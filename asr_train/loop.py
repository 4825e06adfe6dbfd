"""The training loop: numbered stages, one screen.

Forward and backward run unit by unit; the step's loss, its gradients and the wish to stop are summed over ranks; one
host sync a step decides update or skip on all ranks together.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from asr_train import checkpoint
from asr_train.config import Recipe
from asr_train.data.batch import Batch, input_values
from asr_train.data.corpus import Corpus
from asr_train.data.loader import RankTurns, Turn, TurnBatches, make_loader
from asr_train.data.plan import Plan, units_of_rank
from asr_train.data.text import Normaliser
from asr_train.errors import RecipeError, TrainingError
from asr_train.files import append_jsonl
from asr_train.geometry import SAMPLE_RATE
from asr_train.loss import ctc_losses
from asr_train.optim import apply_schedule
from asr_train.progress import TrainingProgress
from asr_train.recipe import parse_cadence
from asr_train.run_dir import RunDir
from asr_train.score import add_metrics, evaluate_set
from asr_train.state import TrainState, due
from asr_train.stop import StopFlag
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
    facts: dict[str, Any]

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.parallel.rank == 0

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; rank 0 does."""
        if self.is_main:
            self.run.log({"attempt": self.attempt, **line, "time": time.time()})


def fit(job: Job, state: TrainState, stop: StopFlag) -> str:
    """The loop: `done` when all steps are made or no better model came for long, `stopped` when asked to."""
    recipe, plan, parallel = job.recipe, job.plan, job.parallel
    turns = iter(_loader(job, state))
    eval_cadence, save_cadence = parse_cadence(recipe.eval.every), parse_cadence(recipe.checkpoint.every)
    clock = _Clock()
    with TrainingProgress(start_step=state.step, max_steps=job.max_steps, is_shown=job.is_main) as progress:
        while not _is_over(job, state):
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
            parallel.module.train()

            # 1. Forward and backward, unit by unit; dropout and masks belong to the unit, not to the rank.
            totals = torch.zeros(3, dtype=torch.float64, device=parallel.device)  # loss, infinite losses, stop
            done: list[tuple[np.ndarray, torch.Tensor]] = []
            is_last = False
            while not is_last:
                turn, batch = clock.wait_for(turns)
                is_last = turn.is_last
                losses = _forward(job, turn, batch.to(parallel.device), totals, num_utterances)
                done.append((batch.ids, losses))

            # 2. Sum over ranks, then update, or skip on all ranks together; one host sync.
            totals[2] += stop.is_set
            (loss, num_infinite, num_stops), norm, is_applied = parallel.update(totals, recipe.optim.max_grad_norm)
            state.step += 1
            state.num_infinite_losses += int(num_infinite)
            _count_skip(job, state, done, progress, is_applied=is_applied)

            # 3. Say what happened, evaluate, save.
            _log_step(job, state, progress, clock, {"epoch": epoch, "loss": loss, "grad_norm": norm, "lr": lr})
            if recipe.log.trained_ids:
                _write_trained_ids(job, state, epoch, step)
            is_best = False
            is_last_step = state.step == job.max_steps
            if recipe.eval.sets and (is_last_step or due(eval_cadence, state.step, plan.steps_per_epoch)):
                is_best = _evaluate(job, state, progress)
                clock.restart()
            is_saving = due(save_cadence, state.step, plan.steps_per_epoch) or (is_best and recipe.checkpoint.save_best)
            if is_saving or num_stops or _is_over(job, state):
                _save(job, state)
                clock.restart()
            if num_stops and not _is_over(job, state):
                progress.say(f"stopped after step {state.step}, checkpoint written; the same command goes on")
                job.log({"event": "stopped", "step": state.step})
                return "stopped"
    if job.is_main:
        job.run.finish(state.to_json())
    return "done"


def _forward(job: Job, turn: Turn, batch: Batch, totals: torch.Tensor, num_utterances: int) -> torch.Tensor:
    """Forward and backward of one unit; adds its share of the step's loss to `totals`, returns its losses [B]."""
    parallel = job.parallel
    torch.manual_seed(batch.seed)
    with parallel.unit(is_last=turn.is_last):
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
    return losses.detach()


def _loader(job: Job, state: TrainState) -> Iterator[tuple[Turn, Batch]]:
    """(turn, batch) of this rank, from the run's position on."""
    epoch, step = state.position(job.plan.steps_per_epoch)
    turns = RankTurns(job.plan, job.parallel.rank, job.parallel.world_size, epoch, step)
    is_cuda = job.parallel.device.type == "cuda"
    return iter(make_loader(job.batches, turns, num_workers=job.recipe.num_workers, pin_memory=is_cuda))


class _Clock:
    """Time of steps and of waiting for data, since the last training line."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew: after a line, and after an evaluation or a save, which are no part of a step."""
        self._start = time.monotonic()
        self.data_wait_s = 0.0
        self.num_steps = 0
        self.audio_s = 0.0

    def wait_for(self, turns: Iterator[tuple[Turn, Batch]]) -> tuple[Turn, Batch]:
        """The next turn; the wait for it is counted."""
        before = time.monotonic()
        found = next(turns)
        self.data_wait_s += time.monotonic() - before
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


def _log_step(job: Job, state: TrainState, progress: TrainingProgress, clock: _Clock, values: dict[str, Any]) -> None:
    """Count the step; write a training line where one is due. Loss and counts are this step's, times are means."""
    epoch, step = divmod(state.step - 1, job.plan.steps_per_epoch)
    units = job.plan.step_units(epoch, step)
    lengths = job.corpus.train.num_samples
    audio_s = float(sum(lengths[unit.ids].sum() for unit in units)) / SAMPLE_RATE
    num_utterances = sum(len(unit.ids) for unit in units)
    state.num_utterances += num_utterances
    state.audio_s += audio_s
    clock.num_steps += 1
    clock.audio_s += audio_s
    progress.advance(state.step)
    if state.step % job.recipe.log.every and state.step != job.max_steps:
        return
    line = {
        "step": state.step,
        **values,
        "num_utterances": num_utterances,
        "audio_s": audio_s,
        "padded_audio_s": sum(len(unit.ids) * unit.padded_samples for unit in units) / SAMPLE_RATE,
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
    done: list[tuple[np.ndarray, torch.Tensor]],
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
    mine = [
        train.id(int(row)) for ids, losses in done for row in ids[~torch.isfinite(losses).cpu().numpy()[: len(ids)]]
    ]
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


def _write_trained_ids(job: Job, state: TrainState, epoch: int, step: int) -> None:
    """Write which utterances this rank trained on in this step."""
    units = job.plan.step_units(epoch, step)
    mine = units_of_rank(len(units), job.parallel.rank, job.parallel.world_size)
    ids = [job.corpus.train.id(int(row)) for unit in mine if unit is not None for row in units[unit].ids]
    line = {"attempt": job.attempt, "step": state.step, "epoch": epoch, "rank": job.parallel.rank, "ids": ids}
    append_jsonl(job.run.path / "trained_ids" / f"rank-{job.parallel.rank}.jsonl", line)


def _evaluate(job: Job, state: TrainState, progress: TrainingProgress) -> bool:
    """Score every set; True when the metric of `eval.best` is the best so far."""
    recipe = job.recipe
    best_metric = recipe.eval.best or f"{next(iter(recipe.eval.sets))}/wer"
    is_best = False
    for name in recipe.eval.sets:
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
        job.log(line)
        job.parallel.accelerator.log({f"{name}/wer": score.wer, f"{name}/cer": score.cer}, step=state.step)
        progress.score(name, line)
        if best_metric.partition("/")[0] == name:
            measured = best_metric.partition("/")[2]
            if measured not in line:
                known = ", ".join(key for key, value in line.items() if isinstance(value, float))
                raise RecipeError(f"eval.best: {best_metric!r}: {name} was scored by: {known}")
            is_best = state.take_evaluation(best_metric, line[measured])
    return is_best


def _is_over(job: Job, state: TrainState) -> bool:
    """Whether all steps are made, or early stopping ends the run."""
    patience = job.recipe.eval.early_stopping
    is_stale = patience is not None and state.num_evaluations_since_best >= patience
    return is_stale or state.step >= job.max_steps


def _save(job: Job, state: TrainState) -> None:
    """Commit a checkpoint of the current state, then delete what need not be kept."""
    checkpoint.save(job.run.checkpoints, job.parallel, state, job.facts)
    if job.is_main:
        checkpoint.prune(job.run.checkpoints, state, job.recipe.checkpoint.keep_last)
