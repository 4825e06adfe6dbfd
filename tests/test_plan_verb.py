"""`wavefleet plan`: what it says of a training against a run that then happens, in text, JSON, and on a page."""

import json
import re

import pytest

from asr_train import pace
from asr_train.errors import CorpusError, RecipeError, RunError
from asr_train.files import append_jsonl, read_jsonl
from asr_train.model_config import load_model_config
from asr_train.pace import Pace
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train
from launch import cli, measure_pace, plan, plan_place, plan_text, plan_training
from launch.node import devices
from launch.site.cluster import load_cluster
from launch.site.slurm import SlurmError

PACE = Pace(flops_per_s=1e9, step_s=0.5, source="made up, for a test")


@pytest.fixture(autouse=True)
def no_gpu_no_slurm_no_child(monkeypatch):
    """The same on every machine; the model's config is read in this process, for speed."""
    monkeypatch.setattr(devices, "num_gpus", lambda: 0)

    def missing(text):
        raise SlurmError("sbatch is not on this machine")

    monkeypatch.setattr(plan.slurm, "expected_start", missing)
    monkeypatch.setattr(
        plan_training, "model_config", lambda recipe, environment: (load_model_config(recipe.model).to_dict(), None)
    )


@pytest.fixture
def recipe_words(tiny_recipe_file, tiny_corpus, tmp_path):
    def words(**changes):
        return [str(tiny_recipe_file(**changes)), f"run_dir={tmp_path / 'run'}"]

    return words


@pytest.fixture
def said(capsys):
    """What the verb prints."""

    def said(*arguments):
        capsys.readouterr()
        assert plan.main(list(map(str, arguments))) == 0
        return capsys.readouterr().out

    return said


@pytest.fixture
def profile(tmp_path):
    def profile(**values):
        path = tmp_path / "site.yaml"
        basis = {
            "nodes": 2,
            "gpus_per_node": 4,
            "gpu_type": "a100",
            "cpus_per_node": 8,
            "time": 90,
            "signal_lead_s": 90,
        }
        path.write_text(json.dumps({**basis, "shared": str(tmp_path / "shared"), **values}))
        return str(path)

    return profile


def test_steps_padding_and_checkpoints_are_those_of_the_run_that_then_happens(
    tiny_recipe, recipe_words, said, tmp_path, monkeypatch
):
    changes = {
        "max_steps": None, "max_epochs": 2, "num_workers": 0, "log.every": 1, "unit_audio_s": 8, "eval.every": "3",
        "checkpoint": {"every": "2", "keep_last": 1, "keep_best": 1},
    }  # fmt: skip
    planned = json.loads(said(*recipe_words(**changes), "--json"))["training"]
    most, log = [0], RunDir.log

    def count(run, line):
        most[0] = max(most[0], len(list(run.checkpoints.glob("step-*"))))
        return log(run, line)

    monkeypatch.setattr(RunDir, "log", count)
    assert train(tiny_recipe(run_dir=str(tmp_path / "run"), **changes)) == 0
    run = RunDir(tmp_path / "run")
    first = next(iter(read_jsonl(run.metrics)))
    assert (planned["epoch"]["num_steps"], planned["max_steps"]) == (first["steps_per_epoch"], first["max_steps"])
    steps = [line for line in read_metrics(run) if "padded_audio_s" in line]
    assert len(steps) == planned["max_steps"]
    epoch = steps[: planned["epoch"]["num_steps"]]
    for name in ("audio_s", "padded_audio_s"):
        assert sum(line[name] for line in epoch) == pytest.approx(planned["epoch"][name], rel=1e-9)
    assert sum(line["num_utterances"] for line in epoch) == planned["epoch"]["num_utterances"] == 40
    evaluations = [line for line in read_metrics(run) if "set" in line]
    assert len(evaluations) == planned["num_evaluations"]
    saved = [line for line in read_jsonl(run.metrics) if line.get("event") == "saved"]
    forecast = planned["checkpoints"]
    assert forecast["num_saves"] <= len(saved) <= forecast["num_saves"] + forecast["num_best"]
    assert max(most[0], len(list(run.checkpoints.glob("step-*")))) <= forecast["most_kept"] + 1


def test_a_program_reads_every_figure(recipe_words, said):
    found = json.loads(said(*recipe_words(), "--processes", "2", "--gpu", "A100-80GB", "--json"))
    assert set(found) == {"run_dir", "training", "cost"}
    assert set(found["cost"]) == {"kind", "total_s", "hours"}
    assert set(found["training"]) == {
        "corpus", "unit_source", "refused", "eval_audio_s", "model_problem", "utterance_s", "lengths", "unit_audio_s",
        "units_per_step", "epoch", "max_steps", "num_epochs", "step_audio_s", "world_size", "strategy", "precision",
        "gpu", "gpu_bytes", "ranks", "chosen", "num_replayed", "memory", "pace", "checkpoints", "num_evaluations",
        "warnings", "notes",
    }  # fmt: skip
    assert set(found["training"]["chosen"]) == {"world_size", "balance", "step_s", "total_s"}
    assert set(found["training"]["warnings"][0]) == {"kind", "text"}
    training = found["training"]
    assert (training["world_size"], training["strategy"], training["gpu"]) == (2, "ddp", "A100-80GB")
    assert "30%" in training["pace"]["source"]
    assert found["cost"]["hours"] == pytest.approx(2 * training["chosen"]["total_s"] / 3600)


@pytest.mark.parametrize("width", [80, 120])
def test_a_person_reads_it_at_the_width_of_a_terminal(width, recipe_words, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = said(
        *recipe_words(units_per_step=8), "--processes", "3", "--gpu", "v100", "model.gradient_checkpointing=true"
    )
    lines = [line for line in text.splitlines() if "/" not in line]  # a path is never broken
    assert max(map(len, lines)) <= width
    for words in (
        r"^speech +40 utterances, 1\.\d minutes; 0\.5 to 3\.0 s", r"^epoch +1 step of 8 units, \d+ units in",
        r"^processes +3 \(ddp\), fp32: of their", r"^memory +\d.* of V100-16GB's 16 GB", r"^time ", r"^\*  +3 ",
        r"^checkpoints +\d+ kB each; 1 save; at most 1 kept", r"^warning +3 processes do not divide",
        r"16\s+to\s+512\s+processes", r"three\s+quarters",
    ):  # fmt: skip
        assert re.search(words, text, re.MULTILINE), words


def test_without_a_gpu_memory_is_said_and_time_is_not(recipe_words, said):
    text = said(*recipe_words())
    assert "time           not known: name a GPU with --gpu, or a pace with --like RUN or --measure" in text
    assert re.search(r"^memory +\d+\.\d MB a process, without", text, re.MULTILINE)


def test_time_is_as_a_run_was_measured(recipe_words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "of_run", lambda run: PACE)
    append_jsonl(tmp_path / "other" / "run.json", {})
    found = json.loads(said(*recipe_words(), "--like", tmp_path / "other", "--json"))
    assert found["training"]["pace"]["source"] == PACE.source
    assert found["cost"]["total_s"] == pytest.approx(4 * found["training"]["chosen"]["step_s"])
    assert found["cost"]["kind"] == "process-hours"
    monkeypatch.setattr(pace, "of_run", lambda run: None)
    with pytest.raises(RunError, match="nothing was measured in"):
        plan.main([*recipe_words(), "--like", str(tmp_path / "other")])


def test_the_pace_is_measured_first_as_it_would_be_trained(recipe_words, said, monkeypatch):
    asked = []
    monkeypatch.setattr(measure_pace, "measured", lambda recipe, **options: asked.append((recipe, options)) or PACE)
    found = json.loads(said(*recipe_words(units_per_step=2), "--measure", "--processes", 2, "--json"))
    [(recipe, options)] = asked
    assert (recipe.units_per_step, options) == (2, {"accelerate": None, "processes": 2})
    assert found["training"]["pace"]["source"] == PACE.source


def test_a_run_that_has_begun_gives_its_own_pace_unless_a_gpu_is_named(recipe_words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "of_run", lambda run: PACE if run.path == tmp_path / "run" else None)

    def source(*options):
        found = json.loads(said(*recipe_words(), *options, "--json"))["training"]["pace"]
        return found and found["source"]

    assert source() is None
    append_jsonl(tmp_path / "run" / "metrics.jsonl", {})
    assert source() == PACE.source
    assert source("--gpu", "H100").startswith("assumed: 30% of the peak of H100")


def test_a_corpus_that_is_not_prepared_is_said_with_the_command(recipe_words, tmp_path, capsys):
    arguments = [*recipe_words(), f"data.corpus_root={tmp_path}"]
    with pytest.raises(CorpusError, match=r"not prepared .*: run `wavefleet prepare \S+recipe.yaml run_dir=\S+ data"):
        plan.main(arguments)
    assert cli.main(["plan", *arguments]) == 4
    assert "wavefleet prepare" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_options_that_do_not_go_together(recipe_words, profile):
    for arguments, words in [
        (["--nodes", "2"], "name its profile with --cluster"),
        (["cluster.time=5"], "name its profile with --cluster"),
        (["--cluster", profile(), "--processes", "2"], "with --cluster the profile says them"),
        (["--gpu", "K80"], "known: V100-16GB"),
        (["--accelerate", "none_such"], "--accelerate"),
    ]:
        with pytest.raises(RecipeError, match=re.escape(words)):
            plan.main([*recipe_words(), *arguments])


def test_the_size_of_units_that_is_left_open_is_estimated_for_a_gpu(recipe_words, said):
    words = recipe_words(unit_audio_s="auto", units_per_step=1)
    found = json.loads(said(*words, "--gpu", "T4", "--json"))["training"]
    assert found["unit_audio_s"] > 10 and "estimated for T4" in found["unit_source"]
    here = json.loads(said(*words, "--json"))["training"]
    assert "this machine" in here["unit_source"]


def test_the_size_that_a_run_found_is_its_own(tiny_recipe, recipe_words, said, tmp_path):
    words = recipe_words(unit_audio_s="auto")
    recipe, run = tiny_recipe(unit_audio_s="auto", run_dir=str(tmp_path / "run")), RunDir(tmp_path / "run")
    run.make()
    run.claim(recipe)
    run.settle_unit(recipe, 9.0)
    found = json.loads(said(*words, "--json"))["training"]
    assert (found["unit_audio_s"], found["unit_source"]) == (9.0, "found in this run")


# --- with a cluster -------------------------------------------------------------------------------------------------


def test_with_a_cluster_both_halves_are_there(recipe_words, said, profile):
    found = json.loads(said(*recipe_words(units_per_step=8), "--cluster", profile(), "--json"))
    assert "#SBATCH" in found["sbatch"] and found["training_problem"] is None
    training, cost = found["training"], found["cost"]
    assert (training["world_size"], training["gpu"], training["strategy"]) == (8, "A100-40GB", "ddp")
    assert cost["slices"] == 1
    assert cost["total_s"] == pytest.approx(training["chosen"]["total_s"] + cost["start_s"])
    assert cost["hours"] == pytest.approx(8 * cost["total_s"] / 3600)
    assert cost["node_hours"] == pytest.approx(2 * cost["total_s"] / 3600)
    text = said(*recipe_words(units_per_step=8), "--cluster", profile())
    assert re.search(r"^jobs +1 job of 90 minutes, less 90 s of\s+signal lead", text, re.MULTILINE)
    assert text.index("speech  ") < text.index("\na job  ") < text.index("batch script:")


def test_with_a_cluster_and_no_corpus_the_job_is_known_all_the_same(recipe_words, said, profile, tmp_path):
    words = [*recipe_words(units_per_step=8), f"data.corpus_root={tmp_path / 'none'}", "--cluster", profile()]
    found = json.loads(said(*words, "--json"))
    assert (found["training"], found["cost"]) == (None, None)
    assert "wavefleet prepare" in found["training_problem"] and "#SBATCH" in found["sbatch"]
    assert "training       not known: its corpus is not prepared" in said(*words)


@pytest.mark.parametrize(
    ("kind", "step_s", "values", "words"),
    [
        ("short_signal_lead", 40.0, {}, "signal_lead_s is 90, and two steps of 40"),
        ("long_step", 6000.0, {}, "a step takes 6,000 s and a job has 5,130 s"),
        ("no_time_to_train", 1.0, {"time": 4, "signal_lead_s": 100}, "has no time to train"),
    ],
)
def test_what_speaks_against_the_jobs(kind, step_s, values, words, recipe_words, said, profile, monkeypatch, tmp_path):
    slow = Pace(flops_per_s=1e18, step_s=step_s, source="made up")
    monkeypatch.setattr(pace, "of_run", lambda run: slow)
    append_jsonl(tmp_path / "other" / "run.json", {})
    arguments = [*recipe_words(units_per_step=8), "--cluster", profile(**values), "--like", tmp_path / "other"]
    found = json.loads(said(*arguments, "--json"))
    assert words in {each["kind"]: each["text"] for each in found["training"]["warnings"]}[kind]
    text = said(*arguments)
    assert re.search(
        r"^jobs +none would come to train" if kind == "no_time_to_train" else r"^jobs +\d+ job", text, re.M
    )


def test_the_gpu_of_a_profile_has_at_least_the_memory_that_it_asks_for(profile):
    assert plan_place.on(load_cluster(profile(gpu_memory="80G"), []), None).gpu.name == "A100-80GB"
    assert plan_place.on(load_cluster(profile(gpus_per_node=0, gpu_type=None), []), None).gpu is None


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        ("cpu", 1, ("single", False)), ("cpu", 2, ("ddp", False)), ("one_gpu", 1, ("single", True)),
        ("ddp", 4, ("ddp", True)), ("fsdp2", 4, ("fsdp2", True)), ("zero2", 4, ("zero2", True)),
        ("zero3", 4, ("zero3", True)),
    ],
)  # fmt: skip
def test_a_config_says_how_the_model_is_shared(config, world_size, expected):
    assert plan_place.strategy_of(config, world_size) == expected


def test_durations_are_said_as_people_say_them():
    assert [plan_text.duration(s) for s in (0.0001, 4.21, 59.4, 200, 18_720, 360_000)] == [
        "under 1 ms", "4.21 s", "59 s", "3 min 20 s", "5 h 12 min", "4 d 4 h",
    ]  # fmt: skip


# --- the model's config, read by another process ----------------------------------------------------------------------


def test_a_child_process_reads_the_models_config(tiny_recipe, monkeypatch):
    monkeypatch.undo()
    values, problem = plan_training.model_config(tiny_recipe(), {})
    assert problem is None
    assert (values["model_type"], values["hidden_size"], values["conv_stride"][0]) == ("wav2vec2", 16, 5)
    values, problem = plan_training.model_config(tiny_recipe(model={"pretrained": "none/such"}), {})
    assert values["hidden_size"] == 768
    assert problem == "the config of none/such is not in the hub's cache here"


def test_of_a_model_whose_config_is_not_here_steps_are_said_and_memory_and_time_are_not(
    recipe_words, said, monkeypatch
):
    stand_in = plan_training._STAND_IN
    monkeypatch.setattr(plan_training, "model_config", lambda recipe, environment: (stand_in, "it is not here"))
    text = said(*recipe_words(), "--gpu", "T4")
    assert re.search(r"^epoch +4 steps of 2 units", text, re.MULTILINE)
    assert "memory         not known: it is not here" in text
    assert "time           not known: it is not here" in text


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "is_phone"), [(1280, False), (390, True)])
def test_the_page_draws_its_charts_in_a_browser(width, is_phone, window, recipe_words, said, profile, tmp_path):
    page = tmp_path / "plan.html"
    words = recipe_words(units_per_step=8, name="plan-of-a-page")
    arguments = [*words, "name=tiny", "--cluster", profile(gpu_type="h100"), "--html", page]
    assert re.fullmatch(r"\S+plan.html \([\d.]+\u202fMB\)\n", said(*arguments))
    window.resize(width, 900, is_phone=is_phone)
    window.open(page)
    assert window.read_log() == ([], [])
    drawn = window.run(
        "return [...document.querySelectorAll('[data-chart]')].map(place => [place.dataset.chart,"
        " place.querySelectorAll('.trace path, .trace .point').length])"
    )
    assert {name for name, number in drawn if number} == {"lengths", "processes", "memory"}
    text = window.run("return document.body.innerText")
    for shown in ("40 utterances", "H100", "#SBATCH", "units hold"):
        assert shown in text
    assert window.run("return document.documentElement.scrollWidth") <= width
