"""Tiny models, recipes and utterances for tests: real families, real arithmetic, a fraction of a second each."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from asr_train.config import Recipe
from asr_train.data.batch import Batch, BatchSettings, make_batch
from asr_train.data.text import Vocabulary
from asr_train.model import SpeechModel, build_model
from asr_train.recipe import decode_recipe

VOCABULARY = Vocabulary.build(["abc def"])  # 9 tokens, blank 0


def recipe(architecture: str = "wav2vec2", config: dict[str, Any] | None = None, **groups: Any) -> Recipe:
    """A recipe of a model of two layers of 16 channels; `config` adds to its config, `groups` to the rest."""
    fields = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "conv_dim": [8] * (13 if architecture.startswith("sew") else 7), "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    if architecture != "data2vec-audio":  # always layer norm
        fields["feat_extract_norm"] = "layer"
    model = {"architecture": architecture, "config": fields | (config or {}), **groups.pop("model", {})}
    data = {"train": {"kind": "demo", "split": "train"}}
    return decode_recipe({"name": "tiny", "max_steps": 10, "data": data, "model": model, **groups})


def no_dropout(**more: Any) -> dict[str, Any]:
    """Config fields that leave nothing to chance."""
    names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    return dict.fromkeys(names, 0.0) | {"layerdrop": 0.0, "mask_time_prob": 0.0} | more


def model(architecture: str = "wav2vec2", config: dict[str, Any] | None = None, **groups: Any) -> SpeechModel:
    """The model of such a recipe, saying nothing."""
    return build_model(recipe(architecture, config, **groups), VOCABULARY, say=lambda text: None)


class Utterances:
    """What `make_batch` reads: noise of given lengths in samples, with a text of 2 to 5 labels each."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.waves = [(generator.standard_normal(length) * 3000).astype(np.int16) for length in lengths]
        self.texts = [generator.integers(2, VOCABULARY.size, 2 + i % 4).astype(np.int32) for i in range(len(lengths))]

    def waveform(self, i: int) -> np.ndarray:
        return self.waves[i]

    def labels(self, i: int) -> np.ndarray:
        return self.texts[i]


def unit(ids: list[int], padded_samples: int) -> Any:
    """A unit of the plan."""
    return SimpleNamespace(ids=np.array(ids, dtype=np.int64), padded_samples=padded_samples)


def batch_of(lengths: list[int], settings: BatchSettings, seed: int | None = None) -> Batch:
    """Utterances of these lengths in one batch."""
    return make_batch(Utterances(lengths), unit(list(range(len(lengths))), max(lengths)), settings, seed)
