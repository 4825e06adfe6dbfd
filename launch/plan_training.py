"""The training half of `wavefleet plan`: corpus, model, and the machine or cluster, brought together for a forecast."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from asr_train.auto_unit import CPU_HEADROOM, CPU_MOST_S, estimated_unit_audio_s
from asr_train.config import Recipe
from asr_train.data.corpus import Corpus, corpus_path
from asr_train.data.plan import PlanSettings
from asr_train.errors import CorpusError, ModelError, RecipeError
from asr_train.forecast import Forecast, Setup, forecast
from asr_train.forecast_warnings import ForecastWarning, refused_warning, warnings_of
from asr_train.geometry import SAMPLE_RATE, WAV2VEC2, FrameGeometry
from asr_train.gpus import Gpu
from asr_train.memory_estimate import MemorySettings
from asr_train.pace import Pace, assumed
from asr_train.recipe import on_hub, run_directory, to_values
from asr_train.run_dir import RunDir
from launch.plan_place import Place

# wav2vec2 base: what stands for a model whose config is not here, where units and steps follow from lengths
_STAND_IN: Mapping[str, Any] = {
    "model_type": "wav2vec2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "conv_dim": [512] * 7, "conv_kernel": list(WAV2VEC2.kernels),
    "conv_stride": list(WAV2VEC2.strides), "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
    "vocab_size": 32,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A forecast, and what is said beside it.

    Attributes:
        unit_source: where the size of units is from.
        refused: training rows that `prepare` refused, by reason.
        eval_audio_s: of all evaluation sets.
        model_problem: why the model's config is not known, and memory and time neither.
        warnings: what speaks against this training.
        notes: what is not in the figures.
    """

    corpus: Path
    forecast: Forecast
    unit_source: str
    refused: Mapping[str, int]
    eval_audio_s: float
    model_problem: str | None
    warnings: tuple[ForecastWarning, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "corpus": str(self.corpus), "unit_source": self.unit_source, "refused": dict(self.refused),
            "eval_audio_s": self.eval_audio_s, "model_problem": self.model_problem, **self.forecast.to_json(),
            "warnings": [asdict(each) for each in self.warnings], "notes": list(self.notes),
        }  # fmt: skip


def plan_training(
    recipe: Recipe, place: Place, words: str, measured: Callable[[Recipe], Pace | None] = lambda _: None
) -> Planned:
    """What a training of this recipe would be, there.

    Args:
        recipe: what is trained.
        place: what it runs on.
        words: the recipe's words on a command line, for messages.
        measured: finds the pace, given a recipe with a number for `unit_audio_s`; where it gives None, one of the GPU
            is assumed.

    Raises:
        CorpusError: it is not prepared.
        ModelError: the model cannot be.
        RecipeError: `unit_audio_s: auto`, of a GPU that is not named.
    """
    if not any(Path(recipe.data.corpus_root).glob(f"{recipe.name}-*/corpus.json")):  # a quick look, without the model
        raise _not_prepared(Path(recipe.data.corpus_root) / f"{recipe.name}-...", words)
    config, model_problem = model_config(recipe, place.environment)
    geometry = FrameGeometry(kernels=tuple(config["conv_kernel"]), strides=tuple(config["conv_stride"]))
    corpus = _open(recipe, geometry, words)
    config = {**config, "vocab_size": corpus.vocabulary.size}
    device: Literal["cuda", "cpu"] = "cuda" if place.on_gpu else "cpu"
    settings = MemorySettings.of(recipe, device=device, strategy=place.strategy, world_size=place.world_size)
    recipe, unit_source = _with_unit(recipe, corpus, config, settings, place)
    pace = measured(recipe)
    if pace is None and place.gpu is not None:
        pace = assumed_pace(recipe, place.gpu)
    setup = Setup(world_size=place.world_size, memory=settings, gpu=place.gpu, pace=pace)
    train = corpus.train
    found = forecast(train.index, train.num_samples, recipe, config, setup, is_model_known=model_problem is None)
    warnings = list(warnings_of(found, recipe, config, train.index, setup))
    refused = corpus.info["sets"]["train"]["rejected"]
    if refused:
        listed = str(corpus.path / "rejected.jsonl")
        warnings.insert(0, refused_warning(refused, found.epoch.num_utterances, recipe, listed))
    evaluated = [corpus.sets[name] for name in recipe.eval.sets]
    return Planned(
        corpus=corpus.path,
        forecast=found,
        unit_source=unit_source,
        refused=refused,
        eval_audio_s=float(sum(each.num_samples.sum() for each in evaluated)) / SAMPLE_RATE,
        model_problem=model_problem,
        warnings=tuple(warnings),
        notes=tuple(_notes(recipe, found)),
    )


def assumed_pace(recipe: Recipe, gpu: Gpu) -> Pace:
    """A share of a GPU's peak; gradient checkpointing computes the forward pass twice, a third of the FLOPs again."""
    pace = assumed(gpu.name, gpu.peak_flops(recipe.precision, tf32=recipe.tf32))
    if not recipe.model.gradient_checkpointing:
        return pace
    source = f"{pace.source}; three quarters of that, for gradient checkpointing computes the forward pass twice"
    return replace(pace, flops_per_s=pace.flops_per_s * 0.75, source=source)


def model_config(recipe: Recipe, environment: Mapping[str, str]) -> tuple[Mapping[str, Any], str | None]:
    """The model's transformers config, as a program with transformers reads it; nothing is fetched.

    Returns:
        The config; or another one that stands for it, and why.

    Raises:
        ModelError: there is no such model; one that is not in the cache of the hub is none of these.
    """
    done = subprocess.run(
        [sys.executable, "-m", "asr_train.model_facts"],
        input=json.dumps(to_values(recipe)), capture_output=True, text=True, check=False,
        env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise ModelError(f"model: its config could not be read:\n{done.stderr.strip()}")
    answer = json.loads(done.stdout)
    if "config" in answer:
        return answer["config"], None
    if recipe.model.pretrained not in on_hub(recipe)[0]:
        raise ModelError(answer["problem"])
    return _STAND_IN, f"the config of {recipe.model.pretrained} is not in the hub's cache here"


def _open(recipe: Recipe, geometry: FrameGeometry, words: str) -> Corpus:
    path = corpus_path(recipe, geometry)
    if not (path / "corpus.json").exists():
        raise _not_prepared(path, words)
    return Corpus.open(path)


def _not_prepared(path: Path, words: str) -> CorpusError:
    return CorpusError(f"its corpus is not prepared ({path}): run `wavefleet prepare {words}`, then plan again")


def _with_unit(
    recipe: Recipe, corpus: Corpus, config: Mapping[str, Any], settings: MemorySettings, place: Place
) -> tuple[Recipe, str]:
    """The recipe with a number for `unit_audio_s: auto`, and where the number is from."""
    if recipe.unit_audio_s != "auto":
        return recipe, "recipe"
    found = RunDir(run_directory(recipe)).with_found_unit(recipe)
    if found.unit_audio_s != "auto":
        return found, "found in this run"
    if place.on_gpu and place.gpu is None:
        raise RecipeError(
            "unit_audio_s: auto: a training finds it on its GPU; name one with --gpu to have it estimated"
        )
    index, plan = corpus.train.index, PlanSettings.of(recipe, config)
    if place.gpu is not None:
        size = estimated_unit_audio_s(config, index, plan, settings, limit_bytes=place.gpu.memory_bytes)
    else:
        free = psutil.virtual_memory().available / place.world_size
        size = estimated_unit_audio_s(
            config, index, plan, settings, limit_bytes=free, headroom=CPU_HEADROOM, most_s=CPU_MOST_S
        )
    if size is None:
        raise RecipeError("unit_audio_s: auto: not even the smallest units are predicted to fit into memory")
    where = "this machine" if place.gpu is None else place.gpu.name
    return replace(recipe, unit_audio_s=size), f"estimated for {where}; a training finds its own, once"


def _notes(recipe: Recipe, found: Forecast) -> list[str]:
    """What the figures leave out."""
    notes = []
    if found.pace is not None:
        left_out = ["start-up"] + ["evaluations"] * bool(found.num_evaluations) + ["waiting for saves"]
        notes.append(f"not in the time: {', '.join(left_out)}")
        if recipe.model.freeze_transformer_steps:
            steps = min(recipe.model.freeze_transformer_steps, found.max_steps)
            notes.append(f"the first {steps:,} steps train the head alone and take about a third of a step")
    if recipe.order == "random":
        notes.append("padding is what is to be expected, for order random makes other shapes in each epoch")
    if recipe.eval.early_stopping:
        notes.append("early stopping may end the run before")
    return notes
