"""The recipe of a small run with everything random on, and what such a run left; a fixture for those who import it."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks

from asr_train import checkpoints
from asr_train.files import read_json, read_jsonl
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train

# Everything random is on: dropouts, SpecAugment, layerdrop. Layer norm in the feature encoder, so padding is harmless.
MODEL = {
    "architecture": "wav2vec2",
    "layerdrop": 0.2,
    "config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "feat_proj_dropout": 0.1,
        "final_dropout": 0.1,
    },
}
MASKS = {"time_prob": 0.3, "time_length": 3, "feature_prob": 0.1, "feature_length": 4}


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """Recipe of a small run, as `recipe(name, key=value, ...)`; keys with dots as `optim__lr`."""

    def make(name, **changes):
        values = {
            "run_dir": str(tmp_path / name),
            "max_steps": 60,
            "unit_audio_s": 8,
            "units_per_step": 4,
            "num_workers": 0,
            "model": MODEL,
            "spec_augment": MASKS,
            "optim.lr": 2e-3,
            "log": {"every": 1, "trained_ids": True, "trackers": []},
        }
        return tiny_recipe(**{key.replace("__", "."): value for key, value in {**values, **changes}.items()})

    return make


def run_on(world_size, recipe):
    assert run_ranks(world_size, train, recipe) == [0] * world_size
    return RunDir(Path(recipe.run_dir))


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run) if "set" not in line}


def audio(run):
    """What each step was made of, and the whole run."""
    names = ("num_utterances", "audio_s", "padded_audio_s")
    lines = {line["step"]: [line[name] for name in names] for line in read_metrics(run) if "set" not in line}
    done = read_json(run.done)
    return lines, [done[name] for name in names[:2]]


def trained(run):
    """step -> ids, sorted, of the last attempt that ran it, over all ranks."""
    lines = [line for path in sorted((run.path / "trained_ids").glob("*.jsonl")) for line in read_jsonl(path)]
    last = {}
    for line in lines:
        last[line["step"]] = max(last.get(line["step"], 0), line["attempt"])
    found = {}
    for line in lines:
        if line["attempt"] == last[line["step"]]:
            found.setdefault(line["step"], []).extend(line["ids"])
    return {step: sorted(ids) for step, ids in sorted(found.items())}


def weights(run, step=None):
    """Every tensor of the model in a checkpoint, the newest one unless a step is named."""
    found = checkpoints.newest(run.checkpoints).path if step is None else run.checkpoints / f"step-{step:010d}"
    metadata = dcp.FileSystemReader(found / "shards").read_metadata()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith("model.")
    }
    dcp.load(state, checkpoint_id=found / "shards", no_dist=True)
    return state


def assert_close(found, expected, relative=1e-5):
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= relative * abs(loss), f"step {step}: {found[step]} for {loss}"
