"""Trainings of other kinds: group-norm models, fixed counts a unit, a pretrained folder, real telephone recordings."""

import pytest
from ranks import run_ranks
from small_run import MODEL, assert_close, losses, recipe, run_on, trained  # noqa: F401  recipe is a fixture
from test_telephone import installed

from asr_train.data import telephone
from asr_train.errors import RecipeError
from asr_train.export import export
from asr_train.files import read_jsonl
from asr_train.recipe import load_recipe
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train

GROUP_NORM = {**MODEL, "config": {**MODEL["config"], "feat_extract_norm": "group", "do_stable_layer_norm": False}}


@pytest.mark.parametrize(
    "batching",
    [{"units_per_step": 5}, {"order": "grouped", "unit_utterances": 3, "units_per_step": 4}],
    ids=["cost", "grouped"],
)
def test_a_group_norm_model_makes_the_same_run_on_1_2_and_3_processes(recipe, batching):  # noqa: F811
    runs = [run_on(size, recipe(f"on{size}", max_steps=25, model=GROUP_NORM, **batching)) for size in (1, 2, 3)]
    first = next(line for line in read_jsonl(runs[0].metrics) if line.get("event") == "started")
    assert first["padding_difference"] > 1e-4  # it is a model that padding changes
    for run in runs[1:]:
        assert_close(losses(run), losses(runs[0]))
        assert trained(run) == trained(runs[0])
    scores = [[(line["step"], line["words"]) for line in read_metrics(run) if "set" in line] for run in runs]
    assert scores[0] == scores[1] == scores[2]


def test_random_order_is_refused_for_a_model_that_padding_changes(recipe):  # noqa: F811
    def refused():
        with pytest.raises(RecipeError, match="order: 'random'"):
            train(recipe("x", model=GROUP_NORM, order="random", unit_utterances=3))

    run_ranks(1, refused)


def test_random_order_makes_the_same_run_on_2_processes(recipe):  # noqa: F811
    one, two = (
        run_on(size, recipe(f"on{size}", max_steps=20, order="random", unit_utterances=3, units_per_step=4))
        for size in (1, 2)
    )
    assert_close(losses(two), losses(one))
    assert trained(two) == trained(one)


def test_a_folder_saved_by_transformers_is_a_pretrained_model(recipe):  # noqa: F811
    """Its weights and its vocabulary are taken, its feature encoder frozen; a run from it starts where it was."""
    base = run_on(1, recipe("base", max_steps=30))
    folder = export(base.path, checkpoint="newest").folder
    tuned = run_on(
        1,
        recipe(
            "tuned",
            max_steps=2,
            text={"processor": str(folder)},
            model={"pretrained": str(folder), "freeze_feature_encoder": True, "gradient_checkpointing": True},
        ),
    )
    assert losses(tuned)[1] < 0.75 * losses(base)[1]
    assert abs(losses(tuned)[1] / losses(base)[30] - 1) < 0.5


@installed
def test_telephone_recordings_train_and_are_scored(tmp_path):
    manifest = tmp_path / "telephone.jsonl"
    assert telephone.main([str(manifest)]) == 0
    overrides = [
        f"data.train.path={manifest}", f"eval.sets.prompts.path={manifest}", f"data.corpus_root={tmp_path}",
        f"run_dir={tmp_path / 'run'}", "max_steps=3", "num_workers=1", "log.every=1",
    ]  # fmt: skip
    assert run_ranks(1, train, load_recipe("telephone", overrides)) == [0]
    lines = list(read_metrics(RunDir(tmp_path / "run")))
    assert [line["step"] for line in lines if "set" not in line] == [1, 2, 3]
    score = next(line for line in lines if "set" in line)
    assert (score["set"], score["num_rows"]) == ("prompts", 57)
    assert 0 < score["wer"] <= 2
