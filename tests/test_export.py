"""A run becomes a folder that transformers loads: the same weights, logits and text, and a card with the scores."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from conftest import RATE
from huggingface_hub.errors import HfHubHTTPError
from ranks import run_ranks
from transformers import AutoModelForCTC, AutoProcessor, pipeline

from asr_train import export as export_module
from asr_train import model_card
from asr_train.checkpoints import newest
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_CHECKPOINT, EXIT_USAGE, ModelError, run_main
from asr_train.export import export, main
from asr_train.files import read_json, read_jsonl
from asr_train.model import build_model, load_exported
from asr_train.restore import load_weights
from asr_train.run_dir import RunDir
from asr_train.train import train
from asr_train.trained import load_trained


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A finished run of 6 steps, evaluated and saved at every second."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = tiny_recipe(
        **{
            "run_dir": str(folder), "max_steps": 6, "num_workers": 0, "eval.every": "2", "checkpoint.every": "2",
            "checkpoint.keep_last": 9, "optim.lr": 5e-3,
        }
    )  # fmt: skip
    assert run_ranks(1, train, recipe) == [0]
    return RunDir(folder)


@pytest.fixture(scope="module")
def exported(run):
    return export(run.path, checkpoint="newest")


def test_transformers_loads_the_weights_of_the_checkpoint(run, exported):
    """Against the checkpoint's own tensors; the positional convolution's weight norm among them."""
    trained = build_model(run.recipe(), load_trained(run.path).corpus.vocabulary, say=lambda _: None).eval()
    load_weights(newest(run.checkpoints), trained)
    loaded = AutoModelForCTC.from_pretrained(exported.folder)
    expected, found = trained.hf.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert sum("pos_conv_embed" in name and "original" in name for name in found) == 2
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name
    assert (exported.folder / "model.safetensors").exists()
    assert not list(exported.folder.glob("*.bin"))
    assert exported.step == 6


def test_the_command_says_where_the_model_is_and_nothing_else(run, tmp_path):
    """DeepSpeed is installed here; transformers loads it, and it tells what it guesses of the machine."""
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    command = [
        sys.executable,
        "-m",
        "asr_train.export",
        str(run.path),
        "--out",
        str(tmp_path / "model"),
        "--checkpoint",
        "newest",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{tmp_path / 'model'}: the model of step 6, loaded again and equal\n"
    assert done.stderr == ""


def test_logits_are_ours(run, exported):
    trained = load_trained(run.path, "newest")
    processor = AutoProcessor.from_pretrained(exported.folder)
    loaded = AutoModelForCTC.from_pretrained(exported.folder)
    row = 3
    waveform = trained.corpus.sets["dev"].waveform(row).astype(np.float32) / 32768
    batch = processor(audio=waveform, sampling_rate=RATE, return_tensors="pt")
    lengths = torch.tensor([len(waveform)])
    again, vocabulary = load_exported(exported.folder)
    with torch.no_grad():
        theirs = loaded(**batch).logits
        ours = trained.model(batch.input_values, lengths)
        reloaded = again(batch.input_values, lengths)
    assert torch.equal(ours, reloaded)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert vocabulary == trained.corpus.vocabulary
    text = pipeline("automatic-speech-recognition", model=str(exported.folder))(waveform)["text"]
    assert text == vocabulary.decode_frames(ours[0].argmax(-1).tolist())


def test_the_best_checkpoint_is_the_default(run, tmp_path):
    lines = {line["step"]: line["wer"] for line in read_jsonl(run.metrics) if "set" in line}
    best = min(lines, key=lambda step: (lines[step], step))
    done = export(run.path, tmp_path / "model")
    assert done.step == best == read_json(run.done)["best_step"]


def test_the_card_says_scores_data_recipe_and_versions(run, exported):
    card = (exported.folder / "README.md").read_text()
    line = [line for line in read_jsonl(run.metrics) if "set" in line and line["step"] == 6][-1]
    assert f"| dev | {line['wer']:.2%} | {line['cer']:.2%} |" in card
    assert "| 12 | 0 |" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "automatic-speech-recognition"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == line["wer"]
    assert "torch " in card
    assert "transformers " in card
    assert "max_steps: 6" in card
    record = read_json(exported.folder / "export.json")
    assert record["scores"]["dev"]["wer"] == line["wer"]
    assert record["step"] == 6


def test_no_path_of_this_machine_is_published(run, exported):
    for path in exported.folder.rglob("*"):
        if path.suffix in (".md", ".yaml", ".json"):
            assert str(run.path.parent) not in path.read_text(), path
            assert "corpora" not in path.read_text().replace("corpus_root: corpora", ""), path


def test_hub_names_reach_the_cards_front_matter(tiny_recipe):
    recipe = tiny_recipe(
        **{
            "data.train": {"kind": "hub", "dataset": "PolyAI/minds14", "config": "en-US"},
            "model": {"pretrained": "facebook/wav2vec2-base"},
        }
    )
    front = model_card._front_matter(recipe, {})
    assert front["base_model"] == "facebook/wav2vec2-base"
    assert front["datasets"] == ["PolyAI/minds14"]
    assert "model-index" not in front
    assert model_card._sources(recipe) == "hub (PolyAI/minds14, en-US, train)"


def test_an_earlier_export_is_replaced_and_nothing_else(run, tmp_path):
    out = tmp_path / "model"
    export(run.path, out)
    (out / "stale.txt").write_text("of the old one")
    export(run.path, out, checkpoint=str(newest(run.checkpoints).path))
    assert not (out / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    assert run_main(main, [str(run.path), "--out", str(other)]) == EXIT_USAGE
    assert (other / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("what", ["weights", "vocabulary"])
def test_an_export_that_differs_is_never_published(run, tmp_path, monkeypatch, what):
    write = export_module._write

    def damage(trained, folder):
        write(trained, folder)
        if what == "weights":
            with torch.no_grad():
                trained.model.hf.wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0.mul_(1.0001)
        else:
            vocab = folder / "vocab.json"
            vocab.write_text(vocab.read_text().replace('"a"', '"q"'))

    monkeypatch.setattr(export_module, "_write", damage)
    with pytest.raises(ModelError, match="weight.original0, logits" if what == "weights" else "text"):
        export(run.path, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


class FakeHub:
    """Stands for `HfApi`: keeps what it is asked."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, repo_id, exist_ok):
        assert exist_ok
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, Path(folder_path), sorted(path.name for path in Path(folder_path).iterdir())))
        assert commit_message


def test_a_push_uploads_the_checked_folder_and_only_when_asked(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    out = tmp_path / "model"
    assert run_main(main, [str(run.path), "--out", str(out)]) == EXIT_DONE
    assert FakeHub.calls == []
    assert run_main(main, [str(run.path), "--out", str(out), "--push-to-hub", "me/tiny"]) == EXIT_DONE
    ((repository, folder, names),) = FakeHub.calls
    assert (repository, folder) == ("me/tiny", out)
    assert {"README.md", "config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"} - set(names) <= {
        "preprocessor_config.json"  # newer transformers keep it in processor_config.json
    }
    assert "https://huggingface.co/me/tiny" in capsys.readouterr().out


def test_a_refused_push_keeps_the_export_and_says_what_to_do(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "HfApi", FakeHub)
    refused = HfHubHTTPError("401 Unauthorized", response=SimpleNamespace(headers={}, request=None))
    monkeypatch.setattr(FakeHub, "error", refused)
    out = tmp_path / "model"
    assert run_main(main, [str(run.path), "--out", str(out), "--push-to-hub", "me/tiny"]) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "401" in error
    assert "hf auth login" in error
    assert (out / "model.safetensors").exists()


def test_what_cannot_be_exported(run, tmp_path, capsys):
    assert run_main(main, [str(tmp_path)]) == EXIT_USAGE
    assert "no run directory" in capsys.readouterr().err
    assert run_main(main, [str(run.path), "--checkpoint", str(tmp_path)]) == EXIT_NO_CHECKPOINT
    assert "neither best, nor newest" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text((run.path / "recipe.yaml").read_text())
    assert run_main(main, [str(tmp_path)]) == EXIT_NO_CHECKPOINT
    assert "has no checkpoint yet" in capsys.readouterr().err
