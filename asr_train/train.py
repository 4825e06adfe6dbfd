"""Train a recipe: `python -m asr_train RECIPE`, alone or under `accelerate launch`. The same command resumes.

Exit codes of a worker: 0 done, or stopped with a committed checkpoint; others as in `errors`. How each rank ended
stands in `outcome/attempt-A/rank-R.json`, for a launcher passes no worker's exit code on.
"""

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from asr_train import checkpoints, strategy
from asr_train.checkpoint import Ranks, Saver
from asr_train.checkpoints import Checkpoint
from asr_train.config import Recipe
from asr_train.data.corpus import Corpus
from asr_train.data.loader import TurnBatches
from asr_train.data.plan import Plan, PlanSettings
from asr_train.data.stage import on_this_node
from asr_train.data.world_size import check_world_size
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RecipeError, RunError, WavefleetError, say
from asr_train.estimate import frame_flops
from asr_train.job import Job
from asr_train.ledger import Ledger
from asr_train.live_state import create_state
from asr_train.lock import LockHeldError
from asr_train.loop import fit
from asr_train.model import PADDING_SENSITIVE_OVER, build_model, padding_difference
from asr_train.model_config import load_model_config
from asr_train.optim import build_optimizer, may_fuse
from asr_train.phase import PhaseFile
from asr_train.prepare import prepare, wait_for_corpus
from asr_train.prometheus import PrometheusFile
from asr_train.recipe import load_recipe, recipe_hash, run_directory
from asr_train.restore import choose, restore
from asr_train.run_dir import RunDir, library_versions, locked_message
from asr_train.score import check_metrics
from asr_train.state import TrainState
from asr_train.stop import Requests, StopFlag, follow_launcher
from asr_train.strategy import Parallel
from asr_train.trackers import open_trackers
from asr_train.trained import load_init
from asr_train.unit_probe import find_unit_audio_s

_Value = TypeVar("_Value")


def main(argv: Sequence[str]) -> int:
    """Command line of the training program."""
    parser = argparse.ArgumentParser(prog="python -m asr_train", description="Train a recipe, or go on with its run.")
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to change, optim.lr=1e-5 say")
    parser.add_argument("--allow-change", action="store_true", help="go on with a run that another recipe started")
    arguments = parser.parse_args(argv)
    return train(load_recipe(arguments.recipe, arguments.overrides), allow_change=arguments.allow_change)


def train(recipe: Recipe, *, allow_change: bool = False) -> int:
    """Train a recipe in its run directory, from its newest checkpoint if there is one; returns the exit code.

    Raises:
        WavefleetError: whatever keeps it from training, written for the user.
    """
    follow_launcher()
    phase = PhaseFile.from_environment(os.environ)
    phase.show("start")
    stop = StopFlag()
    run = RunDir(run_directory(recipe))
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as stack:
        if rank == 0:
            run.make()
            try:
                stack.enter_context(run.lock())
            except LockHeldError as error:
                raise RunError(locked_message(run, error)) from None
            recipe = run.claim(recipe, allow_change=allow_change)
        requests = Requests(run.control, recipe.limits.max_time_s) if rank == 0 else None
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        # where the recipe may have changed, only rank 0 knows whether the run is still done: then all go on to its end
        if run.done.exists() and not (allow_change and world_size > 1):
            if rank == 0:
                say(f"{run.path} is done already; evaluate, export or transcribe with it")
            return EXIT_DONE
        # the attempt's number; other ranks learn it from rank 0, and write nothing before, for it might be another's
        facts = {"world_size": world_size, "recipe_hash": recipe_hash(recipe)}
        attempt = [run.start_attempt(facts)] if rank == 0 else []
        try:
            status, step = _attempt(recipe, run, attempt, stop, requests, phase)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            code = error.exit_code if isinstance(error, WavefleetError) else EXIT_FAILED
            message = f"{type(error).__name__}: {error}"
            outcome = {
                "status": "failed", "exit_code": code, "message": message, "lost_peer": strategy.is_lost_peer(error)
            }  # fmt: skip
            with contextlib.suppress(OSError):  # a full disk may be the very reason; that one is to be said
                for number in attempt:
                    run.write_outcome(number, rank, outcome)
            raise
        code = EXIT_DONE if status == "done" else EXIT_STOPPED
        message = f"stopped by {stop.reason}" if stop.is_set else status
        outcome = {"status": status, "exit_code": code, "step": step, "message": message}
        run.write_outcome(attempt[0], rank, outcome)
    return EXIT_DONE


def _attempt(
    recipe: Recipe, run: RunDir, attempt: list[int], stop: StopFlag, requests: Requests | None, phase: PhaseFile
) -> tuple[str, int]:
    """One life of the run; how it ended, `done` or `stopped`, and at which step."""
    is_main = bool(attempt)

    def tell(text: str) -> None:
        if is_main:
            say(text)

    # 1. Data: prepared by one process, while the others wait on a file, not in a collective.
    strategy.check_environment(recipe)
    check_world_size(recipe.units_per_step, int(os.environ.get("WORLD_SIZE", "1")), recipe.allow_idle_ranks)
    corpus = _corpus(recipe, phase, is_main=is_main)
    check_metrics(recipe.eval.metrics, trust_remote_code=recipe.trust_remote_code)

    # 2. Model; made before accelerate is, whose ZeRO-3 would have transformers make it in pieces. Its weights are
    #    random, over these pretrained ones, over these those of `init_from`; over all of them the run's own (4).
    model = build_model(recipe, corpus.vocabulary, say=tell)
    if recipe.model.init_from is not None:
        load_init(recipe.model.init_from, model, say=tell)
    difference = padding_difference(model)
    is_sensitive = difference > PADDING_SENSITIVE_OVER
    if is_sensitive:
        tell(
            f"padding changes this model's outputs by {difference:.1e}: evaluated in batches of equal length,"
            " trained with units of one rounded length"
        )
    if is_sensitive and recipe.order == "random":
        raise RecipeError("order: 'random': pads utterances of all lengths together, which this model does not bear")

    # 3. Processes, optimizer, plan; the size of units, where that is left open.
    accelerator = strategy.make_accelerator(recipe, str(run.path / "trackers"))
    attempt[:] = _from_rank_0(attempt)
    parallel = strategy.prepare(
        accelerator, model, build_optimizer(model, recipe.optim, fused=may_fuse(accelerator)), recipe
    )
    create_state(parallel)
    recipe = _with_unit_size(recipe, run, corpus, parallel)
    plan = _make_plan(recipe, corpus, model.hf.config)
    facts = _facts(recipe, run, corpus, plan, parallel, attempt[0])

    # 4. The run's newest whole checkpoint, if it has any; all ranks look at it together.
    ranks = Ranks(parallel)
    newest = choose(
        run.checkpoints,
        ranks,
        failures=run.failures(recipe) if is_main else None,
        max_failures=recipe.checkpoint.max_failed_attempts,
        tell=tell,
    )
    state = TrainState()
    if newest is not None:
        if is_main:
            run.note(attempt[0], resumed_from=newest.name)
        state = restore(newest, parallel, ranks, facts)
        tell(f"resumed from {newest.name}")
        if newest.manifest["device"] != facts["device"]:
            tell(
                f"{newest.name} was written on {newest.manifest['device']}, this is {facts['device']}:"
                " losses will differ a little, as arithmetic does"
            )
    if is_main:
        checkpoints.remove_leftovers(run.checkpoints, attempt[0])
    saver = Saver(
        run.checkpoints,
        parallel,
        ranks,
        recipe.checkpoint,
        facts,
        parent=newest.name if newest else None,
        on_commit=lambda committed: _note_commit(run, attempt[0], committed),
    )
    job = Job(
        recipe=recipe,
        run=run,
        attempt=attempt[0],
        corpus=corpus,
        plan=plan,
        parallel=parallel,
        batches=TurnBatches(plan, corpus.train, model.batch_settings, recipe.seed),
        max_steps=recipe.max_steps or (recipe.max_epochs or 0) * plan.steps_per_epoch,
        equal_lengths=is_sensitive,
        saver=saver,
        stop=stop,
        requests=requests,
        phase=phase,
        ledger=Ledger(quadratic=plan.settings.quadratic),
        prometheus=PrometheusFile(recipe.log.prometheus if is_main else None, run.path.name),
    )
    first_line = {
        "event": "restored" if newest else "started", "step": state.step, **facts, "tf32": recipe.tf32,
        "deterministic": recipe.deterministic, "steps_per_epoch": plan.steps_per_epoch, "max_steps": job.max_steps,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "padding_difference": difference,
        "frame_flops": frame_flops(
            model.hf.config.to_dict(), feature_encoder_frozen=recipe.model.freeze_feature_encoder
        ),
    }  # fmt: skip
    job.log(first_line)
    open_trackers(accelerator, recipe, run, state.step)

    # 5. Train; until here a signal just ends the program, for there is nothing to save.
    stop.install()
    try:
        return fit(job, state, is_saved=newest is not None), state.step
    finally:
        phase.show("end", state.step)
        saver.close()
        accelerator.end_training()


def _corpus(recipe: Recipe, phase: PhaseFile, *, is_main: bool) -> Corpus:
    """The prepared data; a phase of its own, for it takes as long as the data is large."""
    phase.show("prepare")
    corpus = on_this_node(prepare(recipe) if is_main else wait_for_corpus(recipe), say)
    phase.show("start")
    return corpus


def _facts(recipe: Recipe, run: RunDir, corpus: Corpus, plan: Plan, parallel: Parallel, attempt: int) -> dict[str, Any]:
    """What an attempt is, for its first line and for the manifests of its checkpoints."""
    return {
        "run_id": run.run_id,
        "attempt": attempt,
        "world_size": parallel.world_size,
        "strategy": parallel.name,
        "precision": recipe.precision,
        "device": _device_name(parallel),
        "recipe_hash": recipe_hash(recipe),
        "corpus_hash": corpus.hash,
        "plan_hash": plan.hash,
        "versions": library_versions(),
    }


def _note_commit(run: RunDir, attempt: int, committed: Checkpoint) -> None:
    """Write that this attempt made progress; a disk that is full now is told by what needs it."""
    with contextlib.suppress(OSError):
        run.note(attempt, committed=committed.name)


def _device_name(parallel: Parallel) -> str:
    """Model of the GPU, or `cpu`: equal losses are promised on equal hardware."""
    return torch.cuda.get_device_name(parallel.device) if parallel.device.type == "cuda" else "cpu"


def _with_unit_size(recipe: Recipe, run: RunDir, corpus: Corpus, parallel: Parallel) -> Recipe:
    """The recipe with a number for `unit_audio_s: auto`: the run's own, or, before its first step, found now."""
    size = _from_rank_0(recipe.unit_audio_s)  # only rank 0 knows what an attempt before has found
    if size == "auto":
        found = find_unit_audio_s(
            recipe, parallel, corpus.train.index, PlanSettings.of(recipe, parallel.module.hf.config.to_dict())
        )
        size = found.unit_audio_s
        if parallel.rank == 0:
            run.settle_unit(recipe, size, how=found.how, device=found.device, strategy=parallel.name)
            say(f"unit_audio_s: auto is {size:g} in this run, {found.how} on {found.device}")
    return replace(recipe, unit_audio_s=size)


def plan_of(recipe: Recipe, corpus: Corpus) -> Plan:
    """The plan that a training of this recipe follows.

    Raises:
        RecipeError: the size of units is left to a training, which asks its device.
    """
    if recipe.unit_audio_s == "auto":
        raise RecipeError("unit_audio_s: auto: a training finds it on its device; give a number to plan with")
    return _make_plan(recipe, corpus, load_model_config(recipe.model, recipe.trust_remote_code, corpus.vocabulary))


def _make_plan(recipe: Recipe, corpus: Corpus, config: PretrainedConfig) -> Plan:
    return Plan(corpus.train.index, PlanSettings.of(recipe, config.to_dict()), recipe.seed)


def _from_rank_0(value: _Value) -> _Value:
    """Rank 0's value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
