"""The text file for Prometheus' node exporter."""

import json
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ranks import run_ranks

from asr_train.errors import RecipeError
from asr_train.prometheus import PrometheusFile, check_prometheus
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train


def samples(path):
    """(name, labels) -> value; and the texts that explain names."""
    families = list(text_string_to_metric_families(path.read_text(encoding="utf-8")))
    assert {family.type for family in families} == {"gauge"}
    values = {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in families
        for sample in family.samples
    }
    return values, {family.name: family.documentation for family in families}


def test_a_training_keeps_its_newest_figures_there_also_those_of_its_evaluations(tiny_recipe, tmp_path):
    path = tmp_path / "collector" / "wavefleet.prom"
    recipe = tiny_recipe(
        run_dir=str(tmp_path / "tiny-1"), num_workers=0,
        **{"log.prometheus": str(path), "log.every": 1, "eval.every": 2},
    )  # fmt: skip
    run_ranks(2, lambda: train(recipe))
    (*_, line), (*_, evaluation) = (
        [line for line in read_metrics(RunDir(tmp_path / "tiny-1")) if key in line] for key in ("loss", "wer")
    )
    values, meanings = samples(path)
    of_run, of_set = '{"run": "tiny-1"}', '{"run": "tiny-1", "set": "dev"}'
    assert values["wavefleet_step", of_run] == 4
    for name in ("loss", "grad_norm", "lr", "audio_s_per_s", "memory_bytes"):
        assert values[f"wavefleet_{name}", of_run] == pytest.approx(line[name]), name
    assert values["wavefleet_wer", of_set] == pytest.approx(evaluation["wer"])
    shares = [value for (name, _), value in values.items() if name.startswith("wavefleet_ledger_")]
    assert sum(shares) == pytest.approx(1, rel=0.01)
    assert all(text and "/" not in text for text in meanings.values())
    assert list(path.parent.iterdir()) == [path]


def test_a_figure_is_renewed_and_those_that_are_not_stay(tmp_path):
    path = tmp_path / "wavefleet.prom"
    file = PrometheusFile(str(path), 'a "run"\\')
    file.show({"step": 10, "loss": 2.5})
    file.show({"wer": 0.5}, evaluated="dev")
    file.show({"wer": 0.7}, evaluated="noisy")
    file.show({"step": 20, "loss": float("nan")})
    values, _ = samples(path)
    run = {"run": 'a "run"\\'}
    assert values.pop(("wavefleet_loss", json.dumps(run))) != 2.5
    assert values == {
        ("wavefleet_step", json.dumps(run)): 20,
        ("wavefleet_wer", json.dumps({**run, "set": "dev"})): 0.5,
        ("wavefleet_wer", json.dumps({**run, "set": "noisy"})): 0.7,
    }


def test_a_file_that_cannot_be_written_any_more_is_said_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    file = PrometheusFile(str(tmp_path / "taken" / "wavefleet.prom"), "tiny")
    file.show({"step": 1})
    file.show({"step": 2})
    said = capsys.readouterr().err
    assert said.count("training goes on") == 1
    assert str(tmp_path / "taken" / "wavefleet.prom") in said


def test_where_no_file_can_be_that_is_said_before_the_training(tmp_path):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"log\.prometheus: .*no file can be written in .*taken"):
        check_prometheus(str(tmp_path / "taken" / "wavefleet.prom"))
    check_prometheus(str(tmp_path / "new" / "wavefleet.prom"))


def test_a_missing_library_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(
        RecipeError, match=r"log.prometheus: needs prometheus-client: pip install 'wavefleet\[trackers\]'"
    ):
        check_prometheus("wavefleet.prom")
