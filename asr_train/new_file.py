"""A recipe for somebody's data as commented YAML: what `new` chose, and why, written to be read and changed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import yaml

from asr_train.data.look import Look
from asr_train.data.sources import AnySource

SCRATCH: Final = "scratch"
ENGLISH: Final = "facebook/wav2vec2-base"
MULTILINGUAL: Final = "facebook/wav2vec2-xls-r-300m"

_COMMENT_COLUMN: Final = 47  # as in the recipes that ship
_WIDTH: Final = 120

_SMALL_MODEL: Final = """\
  layerdrop: 0.0
  config:
    feat_extract_norm: layer
    do_stable_layer_norm: true
    conv_bias: true
    conv_dim: [64, 96, 128]
    conv_kernel: [32, 8, 5]
    conv_stride: [16, 4, 5]
    hidden_size: 128
    num_hidden_layers: 4
    num_attention_heads: 4
    intermediate_size: 512
    num_conv_pos_embeddings: 32
    num_conv_pos_embedding_groups: 8
    hidden_dropout: 0.05
    attention_dropout: 0.0
    activation_dropout: 0.0
    feat_proj_dropout: 0.0
    final_dropout: 0.05
"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a recipe says of some data, and why."""

    model: str  # a pretrained one, or SCRATCH
    model_why: str
    case: str
    remove: str
    max_duration_s: float
    unit_audio_s: float
    units_per_step: int
    max_steps: int
    test_fraction: float | None  # where the data has no evaluation set of its own
    remarks: tuple[str, ...]


def render(name: str, file: str, what: str, look: Look, sets: dict[str, AnySource], choice: Choice) -> str:
    """The recipe's text.

    Args:
        name: of the recipe.
        file: where it will be.
        what: kind of data.
        look: what was seen of the training set.
        sets: evaluation sets by name; a part of the training set when empty.
        choice: the settings.
    """
    step_s = choice.unit_audio_s * choice.units_per_step
    every = max(50, choice.max_steps // 20)
    precision = "on a GPU bf16, or fp16 where it is older than an A100"
    lines = [
        f"# wavefleet prepare {file}",
        f"# wavefleet train {file}",
        "#",
        "# Written by `wavefleet new` after a look at the data:",
        *(f"#   {line}" for line in describe(what, look)),
        *(f"#   note: {remark}" for remark in choice.remarks),
        f"# `wavefleet show {file}` lists every field with its meaning; those that do not stand here have defaults.",
        f"name: {_yaml(name)}",
        _line(f"max_steps: {choice.max_steps}", "as the shipped recipe for about as much data: docs/recipes.md"),
        _line("precision: fp32", precision),
        _line(f"unit_audio_s: {choice.unit_audio_s:g}", "seconds that a process takes at once; less if out of memory"),
        _line(f"units_per_step: {choice.units_per_step}", f"{step_s:.0f} s of audio an update, on any number of GPUs"),
        "data:",
        *_train(look.sources, choice),
        _line(f"  max_duration_s: {choice.max_duration_s:g}", "longer training utterances are refused"),
        "text:",
        _line(f"  case: {choice.case}", _CASE_WHY[look.texts.case]),
        *_remove(choice.remove),
        "model:",
        *_model(choice),
        *_optim(choice),
        "eval:",
        *_eval(sets),
        f"  every: {every}",
        f"checkpoint: {{every: {every}}}",
    ]
    return "\n".join(lines) + "\n"


def describe(what: str, look: Look) -> list[str]:
    """What was seen, in lines."""
    rows = f"{look.num_rows:,}" if look.is_whole else f"the first {look.num_rows:,}"
    lines = [f"{what}: {rows} utterances" + (f", about {look.hours:.2g} hours" if look.is_whole else "")]
    columns = sorted({f"{key} {value}" for source in look.sources for key, value in _said(source).items()
                      if key in ("audio_column", "text_column", "audio_root")})  # fmt: skip
    if columns:
        lines.append(f"found: {', '.join(columns)}")
    seconds = look.durations_s
    middle = float(seconds[len(seconds) // 2])
    lines.append(
        f"lengths of {len(seconds)} of them: {seconds[0]:.1f} to {seconds[-1]:.1f} s, half under {middle:.1f} s; "
        f"{_listed(look.counts('rate_hz'), ' Hz')}; {_listed(look.counts('channels'), ' channel(s)')}; "
        f"{_listed(look.counts('format'))}"
    )
    scripts = look.texts.scripts
    total = max(1, sum(scripts.values()))
    shares = ", ".join(f"{name.capitalize()} {count / total:.0%}" for name, count in scripts.most_common(4))
    lines.append(f"texts: {shares or 'no letters'}; letter case: {look.texts.case}; {len(look.texts.letters)} letters")
    return lines


_CASE_WHY: Final = {
    "both": "the texts have both cases; only one can be heard",
    "upper": "as the texts are",
    "lower": "as the texts are",
    "none": "this script has no case",
}


def _train(sources: Sequence[AnySource], choice: Choice) -> list[str]:
    if len(sources) > 1:
        return ["  train:", *(f"    - {_yaml(_said(source))}" for source in sources)]
    if choice.test_fraction is None:
        return [f"  train: {_yaml(_said(sources[0]))}"]
    split = {**_said(sources[0]), "test_fraction": choice.test_fraction, "part": "train"}
    return [
        _line("  train: &data", f"{choice.test_fraction:.0%} of the rows, by lot, are for evaluation: see eval"),
        *(f"    {key}: {_yaml(value)}" for key, value in split.items()),
    ]


def _eval(sets: dict[str, AnySource]) -> list[str]:
    if not sets:
        speakers = "by the same speakers as in training; others will do worse"
        return [_line("  sets:", speakers), "    held_out: {<<: *data, part: test}"]
    lines = [f"    {name}: {_yaml(_said(source))}" for name, source in sets.items()]
    return ["  sets:", *lines, _line(f"  best: {next(iter(sets))}/wer", "picks the best model")]


def _remove(characters: str) -> list[str]:
    if not characters:
        return []
    text = yaml.safe_dump(characters, default_style='"', allow_unicode=True, width=float("inf")).strip()
    return [_line(f"  remove: {text}", "signs in the texts; take those out that should be learnt")]


def _model(choice: Choice) -> list[str]:
    if choice.model == SCRATCH:
        return [
            f"  # small, from random weights: {choice.model_why}",
            "  # its numbers are those of recipes/telephone.yaml",
            *_SMALL_MODEL.splitlines(),
        ]
    return [_line(f"  pretrained: {_yaml(choice.model)}", choice.model_why), "  freeze_feature_encoder: true"]


def _optim(choice: Choice) -> list[str]:
    if choice.model == SCRATCH:
        return [
            "spec_augment: {time_prob: 0.0, feature_prob: 0.0}",
            "optim: {lr: 2.0e-3, betas: [0.9, 0.98], weight_decay: 0.01}",
        ]
    if choice.model == ENGLISH:
        return [_line("optim: {lr: 3.0e-5}", "of recipes/librispeech_100h.yaml")]
    return [
        _line("optim:", "of recipes/commonvoice_xlsr.yaml"),
        f"  {{lr: 5.0e-4, schedule: linear, warmup_steps: {max(1, choice.max_steps // 10)}}}",
    ]


def _line(text: str, comment: str) -> str:
    """A line with a comment; above it where it would be too long beside it."""
    beside = f"{text:<{_COMMENT_COLUMN - 1}} # {comment}"
    if len(beside) <= _WIDTH:
        return beside
    return f"{' ' * (len(text) - len(text.lstrip()))}# {comment}\n{text}"


def _said(source: AnySource) -> dict[str, Any]:
    """Fields of a source that are not at their defaults."""
    return {
        entry.name: getattr(source, entry.name)
        for entry in fields(source)
        if entry.name == "kind" or getattr(source, entry.name) != entry.default
    }


def _yaml(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("...").strip()


def _listed(counts: Counter[str], unit: str = "") -> str:
    """`16000 Hz`, or each with its share."""
    total = sum(counts.values())
    if len(counts) == 1:
        return f"{next(iter(counts))}{unit}"
    return ", ".join(f"{name}{unit} {count / total:.0%}" for name, count in counts.most_common(4))
