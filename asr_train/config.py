"""The fields of a recipe: everything that defines a training, as frozen dataclasses. `recipe.py` reads and checks them.

Every default lives here and nowhere else. A field made with `setting(..., defines_run=False)` may change between
attempts of one run; every other field is part of the run's identity (`recipe.identity`, `recipe.recipe_hash`).
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval
from pydantic import BeforeValidator, ConfigDict, Discriminator, PlainValidator, StringConstraints
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Cadence = Annotated[str, BeforeValidator(str), StringConstraints(pattern=r"^[1-9][0-9]*( epochs?)?$")]


def _unit_size(value: Any) -> Any:
    """`auto`, or seconds; one message for both kinds."""
    try:
        number = value if value == "auto" else float(value)
    except (TypeError, ValueError):
        number = None
    if isinstance(value, bool) or number is None or (number != "auto" and not 0 < number < float("inf")):
        raise PydanticCustomError("unit_size", "should be a number greater than 0, or auto")
    return number


UnitSize = Annotated[float | Literal["auto"], PlainValidator(_unit_size)]


def setting(meaning: str, default: Any = MISSING, *, defines_run: bool = True) -> Any:
    """A recipe field with its one-line meaning; lists and dicts given as defaults are copied for each recipe."""
    metadata = {"meaning": meaning, "defines_run": defines_run}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def part(kind: type, meaning: str) -> Any:
    """A nested group of fields, all at their defaults unless given."""
    return field(default_factory=kind, metadata={"meaning": meaning, "defines_run": True})


@dataclass(frozen=True, kw_only=True)
class _Strict:
    """An unknown key is an error, in every group."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


# --- data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Source(_Strict):
    """What every source of utterances has: an optional random split of its rows."""

    test_fraction: Annotated[float, Interval(gt=0, lt=1)] | None = setting(
        "share of the rows that `train_test_split` puts into the part `test`; null takes all rows", None
    )
    split_seed: int = setting("seed of that split", 0)
    part: Literal["train", "test"] = setting("which part of the split this source is", "train")


@dataclass(frozen=True, kw_only=True)
class HubSource(_Source):
    """A data set on the Hugging Face hub."""

    kind: Literal["hub"] = setting("a data set on the Hugging Face hub")
    dataset: str = setting("its name, `PolyAI/minds14` say")
    config: str | None = setting("its configuration, `en-US` say", None)
    split: str = setting("a split expression, `train` or `train[:100]` say", "train")
    revision: str | None = setting("a branch, tag or commit", None)
    streaming: bool = setting("read it as a stream, without keeping a copy on disk", False)
    audio_column: str = setting("column with the audio", "audio")
    text_column: str | None = setting("column with the text; null takes transcription, sentence, text, ...", None)


@dataclass(frozen=True, kw_only=True)
class TableSource(_Source):
    """A local table: parquet or Arrow with the audio inside, or CSV, TSV or JSON lines that name audio files."""

    kind: Literal["parquet", "arrow", "csv", "tsv", "jsonl"] = setting("the table's form")
    path: str = setting("a file, a folder of such files, or a pattern with *")
    audio_column: str | None = setting("column with the audio or its path; null finds it", None)
    text_column: str | None = setting("column with the text; null finds it", None)
    audio_root: str | None = setting("folder that relative audio paths start from; null is the table's own", None)
    allow_paths_outside_root: bool = setting("accept audio paths that leave that folder", False)


@dataclass(frozen=True, kw_only=True)
class FolderSource(_Source):
    """A folder tree: audio files with texts beside them, LibriSpeech's tree, or Common Voice's."""

    kind: Literal["audio_folder", "librispeech", "common_voice"] = setting("the tree's form")
    path: str = setting("the folder")
    split: str | None = setting("LibriSpeech: `train-clean-100`; Common Voice: `train`, for train.tsv; else null", None)


@dataclass(frozen=True, kw_only=True)
class DemoSource(_Source):
    """The built-in synthetic corpus of spoken banking requests."""

    kind: Literal["demo"] = setting("the built-in synthetic corpus")
    split: Literal["train", "heldout_sentences", "heldout_voices"] = setting("which of its three sets")


Source = Annotated[HubSource | TableSource | FolderSource | DemoSource, Discriminator("kind")]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_list)]


@dataclass(frozen=True, kw_only=True)
class DataSettings(_Strict):
    """What is prepared, and which rows are refused."""

    train: Sources = setting("source of the training utterances; one, or a list of several")
    corpus_root: str = setting("folder that prepared corpora are kept in", "corpora", defines_run=False)
    num_proc: Count = setting("processes that prepare the corpus", 2, defines_run=False)
    shard_rows: Count = setting("rows a shard; an interrupted prepare loses at most one a process", 1000)
    encoding: Literal["pcm16", "flac"] = setting("how the corpus keeps its audio; flac is smaller and slower", "pcm16")
    min_duration_s: NotNegative = setting("shorter training utterances are refused", 0.1)
    max_duration_s: Positive = setting("longer training utterances are refused", 30.0)
    max_rejected_percent: Annotated[float, Interval(ge=0, le=100)] = setting(
        "more refused rows than this, in any set, is an error", 5.0
    )


@dataclass(frozen=True, kw_only=True)
class TextSettings(_Strict):
    """How transcripts are normalised, and the vocabulary."""

    unicode_form: Literal["NFC", "NFD", "NFKC", "NFKD"] = setting("unicode normal form of transcripts", "NFC")
    case: Literal["upper", "lower", "keep"] = setting("letter case of transcripts", "lower")
    remove: str = setting("characters to remove, as plain characters, not a pattern", "")
    remove_digits: bool = setting("remove digits too", False)
    remove_apostrophes: bool = setting("remove apostrophes too", False)
    processor: str | None = setting(
        "folder or hub name of a pretrained processor that gives the vocabulary; null builds one from train", None
    )
    unknown_characters: Literal["reject", "remove", "unk"] | None = setting(
        "a character outside the vocabulary: refuse the row, drop the character, or map it to [UNK]; "
        "null is reject for a built vocabulary, unk for a given processor",
        None,
    )


# --- model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Strict):
    """What is trained."""

    pretrained: str | None = setting("folder or hub name of pretrained weights; null starts from random ones", None)
    revision: str | None = setting("a branch, tag or commit of the pretrained model", None)
    init_from: str | None = setting(
        "run, checkpoint or exported folder whose weights training starts from, over the pretrained ones", None
    )
    architecture: str = setting("transformers model type for random weights: wav2vec2, hubert, wavlm, ...", "wav2vec2")
    config: dict[str, Any] = setting("fields of the transformers config to set, hidden_dropout say", {})
    layerdrop: Share | None = setting("chance that a transformer layer is skipped; null is the model's own", None)
    attention: Literal["eager", "sdpa", "flash_attention_2"] = setting("attention implementation", "sdpa")
    gradient_checkpointing: bool = setting("recompute activations in the backward pass to save memory", False)
    compile: bool = setting("train with transformer layers compiled by torch, once for all shapes of units", False)
    freeze_feature_encoder: bool = setting("never train the convolutional feature encoder", False)
    freeze_transformer_steps: CountOrZero = setting("train only the head for this many first steps", 0)


@dataclass(frozen=True, kw_only=True)
class SpecAugmentSettings(_Strict):
    """SpecAugment masks on the encoder's input; null takes the model's own value."""

    time_prob: Share | None = setting("share of frames that start or lie in a masked span, on average", None)
    time_length: Count | None = setting("frames a masked span", None)
    time_min_masks: CountOrZero | None = setting("least number of masked spans an utterance", None)
    feature_prob: Share | None = setting("share of channels that start or lie in a masked span", None)
    feature_length: Count | None = setting("channels a masked span", None)
    feature_min_masks: CountOrZero | None = setting("least number of masked channel spans", None)


@dataclass(frozen=True, kw_only=True)
class OptimSettings(_Strict):
    """AdamW and its schedule; the learning rate is a function of the step alone."""

    lr: Positive = setting("peak learning rate", 1e-4)
    betas: tuple[Share, Share] = setting("AdamW's two decay rates", (0.9, 0.98))
    eps: Positive = setting("AdamW's epsilon", 1e-8)
    weight_decay: NotNegative = setting("weight decay of matrices; biases and norms have none", 0.0)
    schedule: Literal["tri_stage", "linear", "cosine", "constant"] = setting("shape of the learning rate", "tri_stage")
    warmup_steps: CountOrZero = setting("steps of linear warm-up (linear, cosine, constant)", 0)
    tri_stage: tuple[Share, Share, Share] = setting("shares of warm-up, hold and decay (tri_stage)", (0.1, 0.4, 0.5))
    tri_stage_scales: tuple[Share, Share] = setting(
        "first and last lr as a share of the peak (tri_stage)", (0.01, 0.05)
    )
    max_grad_norm: Positive | None = setting("gradients are clipped to this norm; null never clips", 1.0)


# --- what happens beside the updates ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvalSettings(_Strict):
    """What is scored, when, and what counts as best."""

    sets: dict[Name, Sources] = setting("evaluation sets by name, each a source like data.train", {})
    every: Cadence | None = setting("steps between evaluations, or `1 epoch`; null evaluates at the end only", None,
                                    defines_run=False)  # fmt: skip
    best: str | None = setting("metric that picks the best model, `dev_clean/wer`; null is the first set's wer", None,
                               defines_run=False)  # fmt: skip
    higher_is_better: bool | None = setting(
        "whether more of that metric is better; null knows wer, cer and other common ones", None, defines_run=False
    )
    early_stopping: Count | None = setting("stop after this many evaluations without a better one", None)
    unit_audio_s: Positive = setting("seconds of audio, padded, an evaluation batch", 100.0, defines_run=False)
    metrics: tuple[str, ...] = setting(
        "further `evaluate` metrics, by name or path; they are programs and need trust_remote_code", (),
        defines_run=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(_Strict):
    """When the run's state is saved, and what is kept."""

    every: Cadence | None = setting("steps between checkpoints, or `1 epoch`; null saves at the end only", None,
                                    defines_run=False)  # fmt: skip
    keep_last: Count = setting("newest checkpoints kept", 2, defines_run=False)
    keep_best: CountOrZero = setting("checkpoints with the best evaluations kept", 1, defines_run=False)
    keep_every: Count | None = setting("checkpoints kept for good: those whose step it divides", None,
                                       defines_run=False)  # fmt: skip
    save_best: bool = setting("save at every best evaluation too", True, defines_run=False)
    asynchronous: bool = setting("write in the background; training waits for a copy in memory only", True,
                                 defines_run=False)  # fmt: skip
    hash: Literal["xxh3_128", "sha256"] = setting("how files are verified; sha256 is ten times slower", "xxh3_128",
                                                  defines_run=False)  # fmt: skip
    max_failed_saves: Count = setting("failed saves in a row that end the run", 3, defines_run=False)
    max_failed_attempts: Count = setting(
        "attempts that failed from one checkpoint, with nothing new saved, before the one before it is taken", 3,
        defines_run=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LogSettings(_Strict):
    """What is written while training."""

    every: Count = setting("steps between training lines", 10, defines_run=False)
    trained_ids: bool = setting("write which utterances each rank trained on at each step", False, defines_run=False)
    trackers: tuple[str, ...] | None = setting(
        "accelerate's trackers, `[tensorboard, wandb]` say; null is TensorBoard where it is installed, `[]` none", None,
        defines_run=False,
    )  # fmt: skip
    prometheus: str | None = setting(
        "file for Prometheus' textfile collector, renewed at each training line; null writes none", None,
        defines_run=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LimitSettings(_Strict):
    """Where a run gives up."""

    max_skipped_steps: Count = setting("skipped non-finite steps in a row that end the run", 10, defines_run=False)
    max_time_s: Positive | None = setting("seconds after which an attempt saves and stops; null never does", None,
                                          defines_run=False)  # fmt: skip
    start_s: Positive = setting("seconds without a sign of life, before the first step, that make a hang", 1800.0,
                                defines_run=False)  # fmt: skip
    step_s: Positive | None = setting(
        "the same in a later step; null is 20 times the attempt's usual step, and 300 at least", None, defines_run=False
    )
    checkpoint_s: Positive = setting("the same while a checkpoint is written, and at the end", 1800.0,
                                     defines_run=False)  # fmt: skip
    evaluation_s: Positive = setting("the same while one set is evaluated", 3600.0, defines_run=False)


@dataclass(frozen=True, kw_only=True)
class Recipe(_Strict):
    """Everything that defines a training."""

    name: Name = setting("name of the run, the corpus and the model folder")
    run_dir: str | None = setting("run directory; null is runs/<name>-<hash8>", None, defines_run=False)
    seed: CountOrZero = setting("seed of weights, plan, dropout and masks", 0)
    max_steps: Count | None = setting("optimizer updates in all", None)
    max_epochs: Count | None = setting("passes over the corpus; one of max_steps and max_epochs is needed", None)
    precision: Literal["fp32", "bf16", "fp16"] = setting("arithmetic of forward and backward", "fp32")
    tf32: bool = setting("let fp32 matrix products round to tf32 on NVIDIA GPUs", False)
    deterministic: bool = setting("use deterministic kernels only, slower", False)
    bf16_gradients: bool = setting("sum gradients over processes in bf16: half the bytes sent, coarser sums", False)
    unit_audio_s: UnitSize = setting(
        "seconds of audio, padded, a unit, on average; a unit is what one process takes at once; auto finds the "
        "largest that fits, once a run",
        100.0,
    )
    unit_utterances: Count | None = setting("utterances a unit, in place of unit_audio_s", None)
    units_per_step: Count = setting("units an optimizer step, over all processes", 8)
    order: Literal["cost", "grouped", "random"] = setting(
        "units of equal cost; of a fixed count of like lengths; of a fixed count at random", "cost"
    )
    allow_idle_ranks: bool = setting("accept more processes than units_per_step", False, defines_run=False)
    num_workers: CountOrZero = setting("processes a rank that build batches", 1, defines_run=False)
    trust_remote_code: bool = setting("run code that comes with models or metrics", False)
    data: DataSettings = setting("what is prepared")
    text: TextSettings = part(TextSettings, "transcripts and vocabulary")
    model: ModelSettings = part(ModelSettings, "what is trained")
    spec_augment: SpecAugmentSettings = part(SpecAugmentSettings, "masks in training")
    optim: OptimSettings = part(OptimSettings, "optimizer and schedule")
    eval: EvalSettings = part(EvalSettings, "evaluation")
    checkpoint: CheckpointSettings = part(CheckpointSettings, "checkpoints")
    log: LogSettings = part(LogSettings, "what is written")
    limits: LimitSettings = part(LimitSettings, "where a run gives up")
