"""The README.md of an exported model: scores, data, recipe, versions, and how to use it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from asr_train.config import HubSource, Recipe
from asr_train.data.corpus import Corpus
from asr_train.recipe import to_values
from asr_train.trained import Trained


def model_card(trained: Trained, scores: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str]) -> str:
    """The text of the card.

    Args:
        trained: the model and where it comes from.
        scores: set name -> its line in metrics.jsonl, of the checkpoint's step.
        versions: library -> version.
    """
    recipe = trained.recipe
    text = asdict(recipe.text)
    # four spaces before each line, for a recipe may hold any text, three backquotes too
    recipe_block = "".join(f"    {line}\n" for line in public_recipe(recipe).splitlines())
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front_matter(recipe, scores), sort_keys=False, allow_unicode=True) + "---",
            "",
            f"# {recipe.name}",
            "",
            f"A {trained.model.hf.config.model_type} model that transcribes speech (CTC, greedy decoding), trained with"
            f" Wavefleet. Weights of step {trained.checkpoint.step}.",
            "",
            "## Scores",
            "",
            _score_table(scores),
            "",
            "WER and CER come from edit counts summed over the whole set. They compare with references as the recipe"
            " normalises them; in the columns *as they came*, with the references untouched. Refused rows had no audio"
            " that decodes, or no reference.",
            "",
            "## Use",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            'transcribe = pipeline("automatic-speech-recognition", model="FOLDER_OR_REPOSITORY")',
            'print(transcribe(samples)["text"])  # 16 kHz mono, float32',
            "```",
            "",
            "Or `wavefleet transcribe FOLDER FILES`: any format and length, with word times and subtitles.",
            "",
            "## Data",
            "",
            _data_table(trained.corpus),
            "",
            f"Source of the training set: {_sources(recipe)}.",
            "",
            f"Transcripts: unicode {text['unicode_form']}, case {text['case']}, removed characters"
            f" {text['remove']!r}; {trained.corpus.vocabulary.size} tokens.",
            "",
            "## Versions",
            "",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
            "## Recipe",
            "",
            recipe_block,
        ]
    )


def public_recipe(recipe: Recipe) -> str:
    """The recipe as YAML for others to read; absolute paths tell of one machine and are cut to their last part."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return yaml.safe_dump(shorten(to_values(recipe)), sort_keys=False, allow_unicode=True)


def _front_matter(recipe: Recipe, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the hub reads (https://huggingface.co/docs/hub/model-cards)."""
    task = {"type": "automatic-speech-recognition"}
    results = [
        {
            "task": task,
            "dataset": {"name": name, "type": name},
            "metrics": [{"type": kind, "value": line[kind], "name": kind.upper()} for kind in ("wer", "cer")],
        }
        for name, line in scores.items()
    ]
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["wavefleet", "ctc", "speech"],
        "metrics": ["wer", "cer"],
    }
    if recipe.model.pretrained is not None and not Path(recipe.model.pretrained).is_absolute():
        matter["base_model"] = recipe.model.pretrained
    if hub := [source.dataset for source in recipe.data.train if isinstance(source, HubSource)]:
        matter["datasets"] = hub
    if results:
        matter["model-index"] = [{"name": recipe.name, "results": results}]
    return matter


def _score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    if not scores:
        return "This checkpoint was not evaluated."
    rows = [
        f"| {name} | {line['wer']:.2%} | {line['cer']:.2%} | {line['wer_raw']:.2%} | {line['cer_raw']:.2%}"
        f" | {line['num_rows']:,} | {line['num_refused']:,} |"
        for name, line in scores.items()
    ]
    head = "| set | WER | CER | WER, as they came | CER, as they came | rows scored | rows refused |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def _data_table(corpus: Corpus) -> str:
    rows = [
        f"| {name} | {entry['rows']:,} | {entry['hours']:.2f} | {sum(entry['rejected'].values()):,} |"
        for name, entry in corpus.info["sets"].items()
    ]
    return "\n".join(["| set | rows | hours | rows refused |", "|---|---|---|---|", *rows])


def _sources(recipe: Recipe) -> str:
    named = []
    for source in recipe.data.train:
        values = asdict(source)
        name = values.get("dataset") or values.get("path")
        parts = [
            Path(name).name if name and Path(name).is_absolute() else name,
            values.get("config"),
            values.get("split"),
        ]
        named.append(f"{source.kind} ({', '.join(str(part) for part in parts if part)})")
    return "; ".join(named)
