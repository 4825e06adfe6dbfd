"""What a plan says of a training: beside counts by hand, brute force, hooks, and the rule that keeps checkpoints."""

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
from test_benchmarks import load
from test_memory_estimate import config, loss_without_alignment
from torch._subclasses.fake_tensor import FakeTensorMode

from asr_train.checkpoints import Checkpoint, kept
from asr_train.config import OptimSettings
from asr_train.data.lengths import LengthIndex, histogram
from asr_train.data.plan import Plan, PlanSettings
from asr_train.errors import RecipeError
from asr_train.estimate import quadratic_share
from asr_train.forecast import Setup, checkpoints_of, forecast, num_slices
from asr_train.forecast_warnings import refused_warning, warnings_of
from asr_train.gpus import find_gpu, gpu_named
from asr_train.memory_estimate import MemorySettings
from asr_train.optim import build_optimizer, create_optimizer_state
from asr_train.pace import Pace

benchmark = load("memory")
PACE = Pace(flops_per_s=1e12, step_s=0.25, source="made up")


def lengths(number=600, shortest_s=1.0, longest_s=16.0):
    return (np.random.default_rng(0).uniform(shortest_s, longest_s, number) * 16_000).astype(np.int64)


def setup(world_size=1, *, gpu=None, pace=None, device="cuda", **settings):
    strategy = "single" if world_size == 1 else "ddp"
    memory = MemorySettings(device=device, **{"strategy": strategy, "world_size": world_size, **settings})
    return Setup(world_size=world_size, memory=memory, gpu=gpu and gpu_named(gpu), pace=pace)


ALONE = setup()


@pytest.fixture
def forecast_of(tiny_recipe):
    """(forecast, warnings by kind) of a base model on made-up lengths, recipe fields changed."""

    def forecast_of(samples=None, setup=ALONE, values=None, **changes):
        samples, values = lengths() if samples is None else samples, values or config()
        recipe = tiny_recipe(**{"unit_audio_s": 100, "units_per_step": 8, **changes})
        index = LengthIndex.build(samples)
        found = forecast(index, samples, recipe, values, setup)
        return found, {each.kind: each.text for each in warnings_of(found, recipe, values, index, setup)}

    return forecast_of


# --- steps and padding ----------------------------------------------------------------------------------------------


def test_units_and_steps_of_a_corpus_that_can_be_counted_by_hand(forecast_of):
    """100 utterances of 2 s, 5 a unit, 4 units a step: 20 units, 5 steps of 40 s, no padding."""
    found, _ = forecast_of(
        np.full(100, 32_000), order="grouped", unit_utterances=5, units_per_step=4, max_steps=None, max_epochs=3
    )
    epoch = found.epoch
    assert (epoch.num_utterances, epoch.num_units, epoch.num_steps, epoch.num_shapes) == (100, 20, 5, 1)
    assert (found.max_steps, found.num_epochs, found.unit_audio_s) == (15, 3.0, None)
    assert (epoch.audio_s, epoch.padded_share, epoch.max_unit_audio_s, found.step_audio_s) == (200.0, 0.0, 10.0, 40.0)
    assert found.utterance_s == (2.0, 2.0, 2.0)
    assert found.chosen.balance.useful_share == 1.0


def test_the_histogram_holds_every_utterance_in_its_bin():
    samples = np.array([8_000, 15_999, 16_000, 31_000, 330_000])  # 0.5, just under 1, 1, 1.94, 20.6 s
    bins = histogram(samples)
    assert [(each.from_s, each.to_s) for each in bins[:2]] == [(0.0, 1.0), (1.0, 2.0)]
    assert {each.from_s: each.num_utterances for each in bins if each.num_utterances} == {0.0: 2, 1.0: 2, 20.0: 1}
    assert sum(each.audio_s for each in bins) == pytest.approx(samples.sum() / 16_000)


# --- ranks and time -------------------------------------------------------------------------------------------------


def brute_force(recipe, samples, values, world_size):
    """(useful, padding, waiting) shares of all ranks' time, one unit and one utterance after the other."""
    settings = PlanSettings.of(recipe, values)
    plan = Plan(LengthIndex.build(samples), settings, recipe.seed)

    def cost(num_samples):
        frames = num_samples
        for kernel, stride in zip(values["conv_kernel"], values["conv_stride"], strict=True):
            frames = (frames - kernel) // stride + 1
        return frames + settings.quadratic * frames**2

    useful = padded = slowest = 0.0
    for step in range(plan.steps_per_epoch):
        ranks = [0.0] * world_size
        for k, unit in enumerate(plan.step_units(0, step)):
            useful += sum(cost(int(samples[i])) for i in unit.ids)
            ranks[k % world_size] += len(unit.ids) * cost(unit.padded_samples)
        padded += sum(ranks)
        slowest += max(ranks)
    total = world_size * slowest
    return [useful / total, (padded - useful) / total, (total - padded) / total]


@pytest.mark.parametrize("order", ["cost", "random"])
def test_shares_of_the_ranks_are_those_of_a_walk_through_every_unit(order, forecast_of, tiny_recipe):
    changes = {"unit_audio_s": 20, "units_per_step": 8, "order": order}
    if order == "random":
        changes["unit_utterances"] = 3
    samples = lengths(900)
    found, _ = forecast_of(samples, setup(3, pace=PACE), **changes)
    assert found.num_replayed == found.epoch.num_steps <= 64
    assert [each.world_size for each in found.ranks] == [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512]
    for each in found.ranks:
        if each.world_size > 8:
            assert (each.balance, each.step_s, each.total_s) == (None, None, None)
            continue
        shares = brute_force(tiny_recipe(**changes), samples, config(), each.world_size)
        balance = each.balance
        assert [balance.useful_share, balance.padding_share, balance.waiting_share] == pytest.approx(shares)


def test_a_step_takes_the_flops_of_its_slowest_rank_at_the_pace_and_what_the_pace_adds(forecast_of, tiny_recipe):
    """wav2vec2 base: about 36 GFLOP a second of audio with a frozen encoder, 42 without."""
    samples = np.full(640, 160_000)  # of 10 s; units of 100 s
    found, _ = forecast_of(samples, setup(4, pace=PACE), max_steps=50)
    units_s = found.step_audio_s / 4  # what each of four ranks computes
    flops_a_second = (found.chosen.step_s - 0.25) * 1e12 / units_s
    assert 36e9 < flops_a_second < 60e9
    assert found.chosen.total_s == pytest.approx(50 * found.chosen.step_s)
    alone = found.ranks[0]
    assert alone.step_s - 0.25 == pytest.approx(4 * (found.chosen.step_s - 0.25))


def test_without_a_pace_no_time_is_said(forecast_of):
    found, _ = forecast_of()
    assert {(each.step_s, each.total_s) for each in found.ranks} == {(None, None)}


@pytest.mark.parametrize(
    ("total_s", "expected"), [(1.0, 1), (3000.0, 1), (3001.0, 2), (30_000.0, 10)]
)  # jobs of 3600 s, of which 3000 train
def test_jobs_one_after_the_other(total_s, expected):
    assert num_slices(total_s, limit_s=3600, signal_lead_s=420, start_s=180) == expected


def test_a_job_without_time_to_train_is_none():
    assert num_slices(1.0, limit_s=600, signal_lead_s=420, start_s=180) is None


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_within_10_percent_of_parameters_gradients_optimizer_and_saved_tensors(forecast_of, monkeypatch):
    """Of a base model and its plan's largest unit, on fake tensors, with gradient checkpointing and without."""
    monkeypatch.setattr("asr_train.loss.ctc_losses", loss_without_alignment)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = benchmark.make_model("wav2vec2 base", frozen=False, attention="sdpa")
        found, _ = forecast_of(setup=setup(device="cpu"), values=model.hf.config.to_dict())
        assert [each.gradient_checkpointing for each in found.memory] == [False, True]
        optimizer = build_optimizer(model, OptimSettings())
        create_optimizer_state(optimizer, [each for group in optimizer.param_groups for each in group["params"]])
        moments = [
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
        ]
        weights = list(model.parameters())
        held = sum(each.numel() * each.element_size() for each in [*weights, *weights, *moments])  # gradients are alike
        for unit in found.memory:
            benchmark.set_checkpointing(model, unit.gradient_checkpointing)
            case = benchmark.Case(
                "wav2vec2 base", unit.gradient_checkpointing, False, "fp32", "sdpa", unit.num_utterances, unit.padded_s
            )
            counted = held + sum(benchmark.measure(model, case))
            assert unit.total_bytes - unit.parts.working == pytest.approx(counted, rel=0.1)


def test_the_largest_unit_is_one_of_the_plan(forecast_of):
    found, _ = forecast_of()
    index = LengthIndex.build(lengths())
    quadratic = quadratic_share(config(), feature_encoder_frozen=False)
    settings = PlanSettings(unit_audio_s=100, unit_utterances=None, units_per_step=8, order="cost", quadratic=quadratic)
    shapes = Plan(index, settings, 0).unit_shapes
    assert (found.memory[0].num_utterances, round(found.memory[0].padded_s * 16_000)) in shapes


# --- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoint(folder, step, value):
    manifest = {"files": {}, "score": None if value is None else ["dev/wer", value, False]}
    if value is not None:
        manifest["score"] = {"metric": "dev/wer", "value": value, "higher_is_better": False}
    return Checkpoint(folder / f"step-{step:010d}", manifest)


@pytest.mark.parametrize("keep_every", [None, 6])
@pytest.mark.parametrize(("keep_last", "keep_best"), [(1, 0), (2, 1), (1, 3)])
@pytest.mark.parametrize(
    ("save_every", "eval_every", "save_best"), [("2", "3", True), ("2", "4", False), (None, "3", True)]
)
def test_the_most_checkpoints_at_once_are_those_of_the_worst_order_of_scores(
    save_every, eval_every, save_best, keep_last, keep_best, keep_every, tiny_recipe, tmp_path
):
    """Beside the rule itself, for many orders of scores; some order reaches the number, none goes over it."""
    recipe = tiny_recipe(**{
        "checkpoint": {"every": save_every, "keep_last": keep_last, "keep_best": keep_best, "keep_every": keep_every,
                       "save_best": save_best},
        "eval.every": eval_every, "max_steps": 13,
    })  # fmt: skip
    found = checkpoints_of(recipe, max_steps=13, steps_per_epoch=100)
    due = {step for step in range(1, 14) if save_every and step % int(save_every) == 0} | {13}
    scored = {step for step in range(1, 14) if step % int(eval_every) == 0} | {13}
    assert found.num_saves == len(due)
    assert found.num_best == (len(scored - due) if save_best else 0)
    generator, most = random.Random(0), 0
    orders = itertools.chain([sorted(scored), sorted(scored, reverse=True)], (
        generator.sample(sorted(scored), len(scored)) for _ in range(200)
    ))  # fmt: skip
    for order in orders:
        value_of = {step: float(rank) for rank, step in enumerate(order)}
        here, best = [], float("inf")
        for step in range(1, 14):
            is_best = step in scored and value_of[step] < best
            best = min(best, value_of.get(step, best))
            if step in due or (is_best and save_best):
                here.append(checkpoint(tmp_path, step, value_of.get(step)))
                here = kept(here, last=keep_last, best=keep_best, every=keep_every)
                most = max(most, len(here))
    # counted as if all evaluations were the best so far, and old: not all rules and cadences allow both at once
    assert most <= found.most_kept <= most + (keep_best > 1 or save_every is None)


def test_room_for_checkpoints_counts_one_that_is_being_written(forecast_of):
    found, _ = forecast_of(**{"checkpoint": {"every": "1", "keep_last": 3, "keep_best": 0}, "eval.sets": {}})
    assert found.checkpoints.each_bytes == found.memory[0].parts.checkpoint
    assert (found.checkpoints.most_kept, found.checkpoints.most_bytes) == (3, 4 * found.checkpoints.each_bytes)


# --- warnings -------------------------------------------------------------------------------------------------------

GOOD = {"unit_audio_s": 100, "units_per_step": 8, "max_steps": 100, "model.freeze_feature_encoder": True}


def test_a_training_that_fits_has_no_warning(forecast_of):
    _, found = forecast_of(
        lengths(5000), setup(8, gpu="H200", feature_encoder_frozen=True, precision="bf16"), **GOOD, precision="bf16"
    )
    assert found == {}


@pytest.mark.parametrize(
    ("kind", "words", "world_size", "changes"),
    [
        ("uneven_units", "3 processes do not divide units_per_step=8: 11% of their turns are idle; use 2 or 4", 3, {}),
        ("more_ranks_than_units", "training refuses this: units_per_step=8 keeps 8 of 16 processes busy", 16, {}),
        ("small_units", "units hold 17.7 s of audio", 8, {"unit_audio_s": 20}),
        ("padding_sensitive", "training refuses it", 8, {"order": "random", "unit_utterances": 10}),
        ("part_of_an_epoch", "max_steps=1 trains on a part", 8, {"max_steps": 1}),
        ("does_not_fit", "What fits: model.gradient_checkpointing=true; unit_audio_s=", 8, {"unit_audio_s": 250}),
    ],
)
def test_warnings(kind, words, world_size, changes, forecast_of):
    gpu = "V100-16GB" if kind == "does_not_fit" else "H200"
    _, found = forecast_of(lengths(5000), setup(world_size, gpu=gpu), **{**GOOD, **changes})
    assert kind in found
    assert re.search(words, found[kind]), found[kind]


def test_a_unit_that_does_not_fit_is_said_with_a_size_that_does(forecast_of):
    large = setup(1, gpu="T4", feature_encoder_frozen=True)
    found, warnings = forecast_of(lengths(5000), large, **{**GOOD, "unit_audio_s": 800})
    assert found.memory[0].total_bytes > 16e9
    size = float(warnings["does_not_fit"].partition("unit_audio_s=")[2].partition(",")[0])
    smaller, warnings = forecast_of(lengths(5000), large, **{**GOOD, "unit_audio_s": size})
    assert smaller.memory[0].total_bytes < 0.85 * 16e9
    assert "does_not_fit" not in warnings and "may_not_fit" not in warnings


def test_refused_rows_are_said_with_the_limit_that_refused_them(tiny_recipe):
    recipe = tiny_recipe(**{"data.max_duration_s": 20})
    said = refused_warning({"too long": 1200, "empty text": 3}, 8797, recipe, "corpus/rejected.jsonl").text
    assert said == (
        "1,203 of 10,000 training rows were refused: 1,200 too long (data.max_duration_s=20), 3 empty text; "
        "see corpus/rejected.jsonl"
    )


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A100-80GB", "A100-80GB"), ("a100", "A100-40GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"), ("NVIDIA H100 80GB HBM3", "H100"), ("nvidia_h200", "H200"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"), ("rtx4090", "RTX-4090"), ("L40S", "L40S"), ("L40", None),
        ("A1000", None), ("a100_3g.20gb", None), ("GeForce RTX 3090 Ti", None),
    ],
)  # fmt: skip
def test_gpus_by_their_names_here_in_drivers_and_in_clusters(name, expected):
    found = find_gpu(name)
    assert (found and found.name) == expected


def test_of_two_sizes_the_one_with_enough_memory_is_meant():
    assert find_gpu("a100", memory_gb=60).name == "A100-80GB"


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"'K80' is not known here; known: V100-16GB, .*RTX-4090"):
        gpu_named("K80")


def test_bf16_is_slow_where_tensor_cores_have_none():
    assert gpu_named("V100-16GB").peak_flops("bf16") == gpu_named("V100-16GB").peak_flops("fp32") == 15.7e12
    assert gpu_named("A100-40GB").peak_flops("bf16") == gpu_named("A100-40GB").peak_flops("fp16") == 312e12
    assert gpu_named("A100-40GB").peak_flops("fp32", tf32=True) == 156e12


def test_a_forecast_is_plain_values(forecast_of):
    found, _ = forecast_of(setup=setup(2, gpu="H100", pace=PACE))
    assert json.loads(json.dumps(found.to_json()))["chosen"]["world_size"] == 2
