"""The recipes that ship: each loads, opens with the command that runs it, and keeps to its source's numbers."""

import shlex

import pytest

from asr_train import resources
from asr_train.recipe import dump_recipe, load_recipe, recipe_hash, walk

RECIPES = resources.shipped("recipes")


def test_all_are_there():
    assert set(RECIPES) >= {"demo", "minds14", "librispeech_100h", "commonvoice_xlsr", "telephone"}


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads_is_named_as_its_file_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.eval.sets, "nothing would say whether the training was any good"
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert recipe_hash(load_recipe(again)) == recipe_hash(recipe)


def opening_command(name):
    """The training command in the comment that a recipe opens with, as words, without a remark far to its right."""
    opening = RECIPES[name].read_text(encoding="utf-8").partition("\nname:")[0].replace("\\\n#", "")
    (line,) = (line for line in opening.splitlines() if line.startswith("# wavefleet train"))
    return shlex.split(line.removeprefix("#").partition("      ")[0])


@pytest.mark.parametrize("name", RECIPES)
def test_it_opens_with_the_command_that_runs_it(name):
    program, verb, recipe, *overrides = opening_command(name)
    assert (program, verb, recipe) == ("wavefleet", "train", name)
    load_recipe(recipe, overrides)


@pytest.mark.parametrize("name", set(RECIPES) - {"demo"})
def test_it_names_where_its_numbers_come_from(name):
    comments = [line for line in RECIPES[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = " ".join(comments)
    assert any(word in text for word in ("https://", "README.md", "measured", "Debian"))


# From the page itself, and from TrainingArguments' defaults in transformers 5.23 for what it does not mention.
GUIDE = {
    "max_steps": 2000,
    "precision": "fp16",
    "unit_utterances": 8,
    "units_per_step": 2,
    "order": "grouped",
    "text.case": "upper",
    "text.processor": "facebook/wav2vec2-base",
    "model.pretrained": "facebook/wav2vec2-base",
    "model.gradient_checkpointing": True,
    "model.freeze_feature_encoder": False,
    "optim.lr": 1e-5,
    "optim.schedule": "linear",
    "optim.warmup_steps": 500,
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "eval.every": "1000",
    "eval.best": "test/wer",
    "checkpoint.every": "1000",
    "log.every": 25,
}


def test_minds14_is_the_guides():
    recipe = load_recipe("minds14")
    values = {key: value for key, value, _ in walk(recipe)}
    assert {key: values[key] for key in GUIDE} == GUIDE
    (train,), (test,) = recipe.data.train, recipe.eval.sets["test"]
    assert (train.dataset, train.config, train.split) == ("PolyAI/minds14", "en-US", "train[:100]")
    assert (train.test_fraction, train.part, test.part) == (0.2, "train", "test")
    assert (test.dataset, test.split, test.split_seed) == (train.dataset, train.split, train.split_seed)


def test_the_guides_silent_defaults_are_still_those_of_its_trainer(tmp_path):
    from transformers import TrainingArguments  # noqa: PLC0415 - seconds, for this test alone

    silent = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    recipe = load_recipe("minds14")
    assert silent.lr_scheduler_type == recipe.optim.schedule
    assert (silent.adam_beta1, silent.adam_beta2) == recipe.optim.betas
    assert (silent.adam_epsilon, silent.weight_decay) == (recipe.optim.eps, recipe.optim.weight_decay)
    assert (silent.max_grad_norm, silent.seed) == (recipe.optim.max_grad_norm, recipe.seed)


def test_librispeech_steps_on_1600_seconds_as_fairseq_does():
    recipe = load_recipe("librispeech_100h")
    max_tokens, num_gpus, update_freq = 3_200_000, 2, 4
    assert recipe.unit_audio_s * recipe.units_per_step == max_tokens * num_gpus * update_freq / 16_000


def test_commonvoice_steps_on_64_utterances_and_removes_the_listed_characters():
    recipe = load_recipe("commonvoice_xlsr")
    assert recipe.unit_utterances * recipe.units_per_step == 8 * 4 * 2
    assert set(recipe.text.remove) == set(', ? . ! - ; : " “ % ‘ ” �'.replace(" ", ""))  # noqa: RUF001
    assert recipe.text.processor is None
