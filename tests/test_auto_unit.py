"""`unit_audio_s: auto`: the search, real steps under a limit, what is remembered, and the run that follows."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from ranks import run_ranks
from small_run import losses, run_on
from transformers import AutoConfig

from asr_train import strategy, unit_probe
from asr_train.auto_unit import (
    cache_file,
    candidates,
    estimated_unit_audio_s,
    largest,
    recall,
    remember,
    worst_shapes,
)  # fmt: skip
from asr_train.data.lengths import LengthIndex
from asr_train.data.plan import PlanSettings
from asr_train.errors import RecipeError, RunError
from asr_train.live_state import create_state
from asr_train.memory_estimate import MemorySettings, UnitShape, memory
from asr_train.model import build_model
from asr_train.optim import build_optimizer
from asr_train.prepare import prepare
from asr_train.recipe import recipe_hash, run_directory
from asr_train.run_dir import RunDir
from asr_train.train import train

SETTINGS = PlanSettings(unit_audio_s=1.0, unit_utterances=None, units_per_step=2, order="cost", quadratic=1e-4)


def index_of(num_utterances=20_000, longest_s=20.0):
    generator = np.random.default_rng(0)
    return LengthIndex.build((generator.uniform(1.0, longest_s, num_utterances) * 16_000).astype(np.int64))


# The search


@pytest.mark.parametrize("guess", [None, 5, 63, 100, 1000])
@pytest.mark.parametrize("limit", [5, 63, 99, 1000])
def test_the_largest_size_that_fits_is_found_in_few_tries(limit, guess):
    sizes, asked = candidates(index_of(), units_per_step=2), []

    def fits(size):
        asked.append(size)
        return size <= limit

    assert largest(sizes, fits, guess) == max(size for size in sizes if size <= limit)
    assert len(asked) == len(set(asked)) <= 8  # of 47


def test_where_nothing_fits_nothing_is_found():
    assert largest([5.0, 10.0], lambda size: False) is None


def test_a_good_guess_needs_two_tries():
    asked = []

    def fits(size):
        asked.append(size)
        return size <= 100

    assert largest(candidates(index_of(), units_per_step=2), fits, guess=100) == 100
    assert asked == [100, 112]


def test_units_are_never_so_large_that_the_corpus_lacks_a_whole_step():
    short = LengthIndex.build(np.full(100, 16_000))  # 100 s
    assert max(candidates(short, units_per_step=2)) == 50
    assert candidates(short, units_per_step=1000) == [5.0]


def test_out_of_memory_is_an_answer_and_any_other_error_is_not():
    def failing(error):
        def step():
            raise error

        return step

    assert unit_probe.survives(lambda: None)
    assert not unit_probe.survives(failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert not unit_probe.survives(failing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(RuntimeError, match="shapes"):
        unit_probe.survives(failing(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_the_worst_units_are_the_longest_the_fullest_and_the_most_expensive():
    shapes = worst_shapes(index_of(), replace(SETTINGS, unit_audio_s=100), 0, lambda shape: shape.num_utterances % 7)
    assert max(shape.padded_samples for shape in shapes) >= 20 * 16_000
    assert max(shape.num_utterances for shape in shapes) > 60
    assert any(shape.num_utterances % 7 == 6 for shape in shapes)


# The estimate


def test_the_estimated_size_fits_and_the_next_one_does_not():
    config, index = AutoConfig.for_model("wav2vec2", vocab_size=32).to_dict(), index_of()
    settings = MemorySettings(feature_encoder_frozen=True, precision="bf16")
    limit = 24 * 2**30

    def peak(unit_audio_s):
        shapes = worst_shapes(
            index, replace(SETTINGS, unit_audio_s=unit_audio_s), 0, lambda shape: memory(config, shape, settings).total
        )
        return max(memory(config, shape, settings).total for shape in shapes)

    found = estimated_unit_audio_s(config, index, SETTINGS, settings, limit_bytes=limit, headroom=0.2)
    sizes = candidates(index, 2)
    assert peak(found) <= 0.8 * limit < peak(sizes[sizes.index(found) + 1])
    more = replace(settings, gradient_checkpointing=True)
    assert estimated_unit_audio_s(config, index, SETTINGS, more, limit_bytes=limit, headroom=0.2) > found
    assert estimated_unit_audio_s(config, index, SETTINGS, settings, limit_bytes=2**30) is None


# Steps that are tried


@pytest.fixture(scope="module")
def parallel(tiny_recipe, tiny_corpus):
    recipe = tiny_recipe(**{"optim.lr": 0.5, "optim.weight_decay": 0.1})
    model = build_model(recipe, tiny_corpus.vocabulary, say=lambda text: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("DS_ACCELERATOR", "cpu")
        made = strategy.prepare(
            strategy.make_accelerator(recipe, "nowhere"), model, build_optimizer(model, recipe.optim), recipe
        )
    create_state(made)
    yield made
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_step_that_is_tried_changes_no_bit_of_the_run(parallel):
    def everything():
        states = [tensor for state in parallel.optimizer.state.values() for tensor in state.values()]
        rates = [torch.tensor([group["lr"], group["weight_decay"]]) for group in parallel.optimizer.param_groups]
        return [tensor.clone() for tensor in (*parallel.module.state_dict().values(), *states, *rates)]

    before = everything()
    unit_probe.make_step(parallel, UnitShape(3, 16_000))
    assert all(map(torch.equal, before, everything()))
    gradients = [parameter.grad for parameter in parallel.module.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)  # it was a whole step
    parallel.stepper.zero_grad()


def test_steps_of_the_real_model_under_a_limit_find_what_the_limit_allows(parallel, tiny_corpus):
    index, config = tiny_corpus.train.index, parallel.module.hf.config.to_dict()
    settings, made = MemorySettings(device="cpu"), []
    plan = replace(SETTINGS, units_per_step=1)
    sizes = candidates(index, 1)

    def peak(size):
        bytes_of = lambda shape: memory(config, shape, settings).total  # noqa: E731
        return [(bytes_of(s), s) for s in worst_shapes(index, replace(plan, unit_audio_s=size), 0, bytes_of)]

    limit = max(peak(sizes[len(sizes) // 2]))[0]

    def step(size):
        for needed, shape in peak(size):
            if needed > limit:
                raise torch.OutOfMemoryError(f"limit of {limit} bytes")
            unit_probe.make_step(parallel, shape)
            made.append(shape)

    found = largest(sizes, lambda size: unit_probe.survives(lambda: step(size)))
    assert sizes[0] < found < sizes[-1]
    assert max(peak(found))[0] <= limit < max(peak(sizes[sizes.index(found) + 1]))[0]
    assert made


def test_a_gpu_is_tried_once_and_remembered_by_what_it_was_tried_for(parallel, tiny_corpus, tiny_recipe, monkeypatch):
    """The device's part is played: what it holds, and that large units do not fit."""
    tried, budgets = [], set()

    def survives(_, shape, budget):
        tried.append(shape)
        budgets.add(budget)
        return shape.num_utterances * shape.padded_samples <= 30 * 16_000

    fake = SimpleNamespace(
        **{name: getattr(parallel, name) for name in ("module", "name", "world_size", "rank")},
        device=SimpleNamespace(type="cuda"),
    )
    monkeypatch.setattr(unit_probe, "_survives", survives)
    monkeypatch.setattr(unit_probe, "_free_bytes", lambda _: 2.0**33)
    monkeypatch.setattr(unit_probe, "_least", lambda _, value: value or 0.0)
    gpu = SimpleNamespace(name="a GPU", total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    index, plan = tiny_corpus.train.index, replace(SETTINGS, units_per_step=1)

    first = unit_probe.find_unit_audio_s(tiny_recipe(), fake, index, plan)
    assert first.how == "tried"
    assert 10 < first.unit_audio_s <= 30
    assert list(budgets) == [pytest.approx(0.9 * 2**33)], "a tenth of the memory stays free"
    num_tried = len(tried)
    again = unit_probe.find_unit_audio_s(tiny_recipe(), fake, index, plan)
    assert (again.how, again.unit_audio_s, len(tried)) == ("remembered", first.unit_audio_s, num_tried)
    for change in ({"precision": "bf16"}, {"model.gradient_checkpointing": True}):
        assert unit_probe.find_unit_audio_s(tiny_recipe(**change), fake, index, plan).how == "tried"
    fake.name = "ddp"
    assert unit_probe.find_unit_audio_s(tiny_recipe(), fake, index, plan).how == "tried"
    fake.name, gpu.name = "single", "another GPU"
    assert unit_probe.find_unit_audio_s(tiny_recipe(), fake, index, plan).how == "tried"
    monkeypatch.setattr(unit_probe, "_survives", lambda *_: False)
    gpu.name = "a small GPU"
    with pytest.raises(RecipeError, match="gradient_checkpointing"):
        unit_probe.find_unit_audio_s(tiny_recipe(), fake, index, plan)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_is_remembered_lies_in_the_users_cache_and_may_be_damaged(tmp_path, monkeypatch):
    assert cache_file() == tmp_path / "cache" / "wavefleet" / "unit_audio_s.json"
    assert recall("a") is None
    remember("a", 80.0, {"device": "a GPU"})
    remember("b", 90.0, {})
    assert (recall("a"), recall("b"), recall("c")) == (80.0, 90.0, None)
    cache_file().write_text("{torn", encoding="utf-8")
    assert recall("a") is None
    remember("a", 80.0, {})
    assert recall("a") == 80.0
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to pass over
    assert cache_file() == Path.home() / ".cache" / "wavefleet" / "unit_audio_s.json"


# The recipe and the run


def test_auto_or_a_positive_number(tiny_recipe):
    assert tiny_recipe(unit_audio_s="auto").unit_audio_s == "auto"
    assert tiny_recipe(unit_audio_s=50).unit_audio_s == 50
    for wrong in ("much", 0, -3, True, float("nan"), [1]):
        with pytest.raises(RecipeError, match=r"unit_audio_s: .*: should be a number greater than 0, or auto"):
            tiny_recipe(unit_audio_s=wrong)
    with pytest.raises(RecipeError, match=r"'auto': order 'grouped' sizes units by unit_utterances"):
        tiny_recipe(unit_audio_s="auto", order="grouped", unit_utterances=4)


def test_a_run_keeps_its_name_and_its_number(tiny_recipe, tmp_path):
    written = tiny_recipe(unit_audio_s="auto")
    run = RunDir(tmp_path / "run")
    run.make()
    assert run.claim(written).unit_audio_s == "auto"
    run.settle_unit(written, 80.0, how="tried", device="a GPU")
    assert run.recipe().unit_audio_s == 80.0
    assert run.claim(written).unit_audio_s == 80.0  # the same command again
    assert run.recipe().unit_audio_s == 80.0
    assert run.claim(replace(written, unit_audio_s=80.0)).unit_audio_s == 80.0
    assert json.loads((run.path / "run.json").read_text())["recipe_hash"] == recipe_hash(written)
    assert run_directory(written).name.endswith(recipe_hash(written)[:8])
    with pytest.raises(RunError, match=r"unit_audio_s: 80\.0 -> 90"):
        run.claim(replace(written, unit_audio_s=90.0))
    assert run.claim(replace(written, unit_audio_s=90.0), allow_change=True).unit_audio_s == 90.0
    with pytest.raises(RunError, match=r"unit_audio_s: 90\.0 -> 'auto'"):  # what was found counts no more
        run.claim(written)


def test_a_run_with_auto_is_the_run_with_its_number_also_when_it_goes_on_elsewhere(tiny_recipe, tmp_path, monkeypatch):
    def recipe(name, **changes):
        return tiny_recipe(run_dir=str(tmp_path / name), units_per_step=4, **{"log.every": 1}, **changes)

    first = recipe("auto", unit_audio_s="auto", max_steps=4)
    run_on(2, replace(first, limits=replace(first.limits, max_time_s=1e-9)))  # stops after a step
    run = RunDir(tmp_path / "auto")
    number = run.recipe().unit_audio_s
    assert number in candidates_of(first)
    about = json.loads((run.path / "run.json").read_text())["unit_audio_s_found"]
    assert about["how"] == "estimated"
    assert about["device"] == "cpu"
    assert not run.done.exists()

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))  # a smaller machine
    run_on(1, first)
    run_on(1, recipe("number", unit_audio_s=number, max_steps=4))
    assert losses(run) == pytest.approx(losses(RunDir(tmp_path / "number")), rel=1e-5)
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["unit_audio_s"] == number


def candidates_of(recipe):
    return candidates(prepare(recipe, progress=False).train.index, recipe.units_per_step)


def test_a_machine_with_no_memory_left_is_told_what_to_set(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))

    def refused():
        with pytest.raises(RecipeError, match="not even the smallest units fit into memory"):
            train(tiny_recipe(run_dir=str(tmp_path / "run"), unit_audio_s="auto"))

    run_ranks(1, refused)
