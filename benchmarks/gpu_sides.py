"""Trainings for `gpu.py`: ours, whole, and transformers' Trainer as its guide has it, on noise made here.

Every function is run in a process of its own, forked from one that has imported everything and touched no device.
"""

import importlib.util
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import soundfile
import torch
import transformers
from length_sets import length_set
from measuring import memory_bytes
from model_shapes import MODEL_SHAPES, TINY_SHAPE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCTC, Trainer, TrainerCallback, TrainingArguments, Wav2Vec2Processor

import asr_train.train
from asr_train.checkpoint import Saver
from asr_train.data.corpus import Corpus
from asr_train.errors import ModelError
from asr_train.estimate import training_flops_per_s
from asr_train.geometry import SAMPLE_RATE
from asr_train.loss import Backend, ctc_losses, fits_cudnn
from asr_train.model_config import load_model_config
from asr_train.phase import Phase, PhaseFile
from asr_train.prepare import prepare
from asr_train.recipe import decode_recipe
from asr_train.run_dir import RunDir, read_metrics

SHAPES = {**MODEL_SHAPES, "tiny": TINY_SHAPE}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
GUIDE_BATCH, GUIDE_ACCUMULATION = 8, 2  # https://huggingface.co/docs/transformers/tasks/asr
GUIDE_UTTERANCES = 6 * GUIDE_BATCH * GUIDE_ACCUMULATION  # whole steps, so that an epoch's audio is known
_LETTERS = [*"etaoinshrdlu "]
_LETTERS_A_SECOND = 14  # of read speech
_WATCHED = 3  # steps in which synchronisations are counted, and as many that are profiled; after the timed ones


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to train with ours."""

    shape: str
    precision: str = "bf16"
    unit_audio_s: float = 200
    step_audio_s: float = 1600  # fairseq's, of an update
    kernel: str | None = None  # of attention; None leaves it to torch
    compile: bool = False
    checkpointing: bool = False
    as_the_guide: bool = False  # its batch, and what it trains
    warmup: int = 5  # steps that are not counted
    timed: int = 20
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_steps(self) -> int:
        """All steps: warm-up, timed, and on a GPU those that are watched."""
        return self.warmup + self.timed + (2 * _WATCHED if torch.cuda.is_available() else 0)

    def values(self, corpus_values: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
        """The recipe."""
        batching: dict[str, Any] = {
            "unit_audio_s": self.unit_audio_s,
            "units_per_step": max(1, round(self.step_audio_s / self.unit_audio_s)),
        }
        if self.as_the_guide:
            batching = {"order": "grouped", "unit_utterances": GUIDE_BATCH, "units_per_step": GUIDE_ACCUMULATION}
        return {
            **corpus_values,
            **batching,
            "run_dir": str(run_dir),
            "max_steps": self.max_steps,
            "precision": self.precision,
            "num_workers": 2 if torch.cuda.is_available() else 1,
            "model": {
                "config": SHAPES[self.shape],
                "compile": self.compile,
                "gradient_checkpointing": self.checkpointing,
                "freeze_feature_encoder": not self.as_the_guide,
                "layerdrop": 0.0,
            },
            "log": {"every": 1},
            **self.recipe,
        }


# --- speech -----------------------------------------------------------------------------------------------------


def make_corpus(folder: Path, num_utterances: int, shortened: int) -> dict[str, Any]:
    """Noise of LibriSpeech-like lengths with as many letters as would be read in that time, prepared; recipe values.

    A smoke run's are shortened, so many times.
    """
    random = np.random.default_rng(0)
    noise = (random.standard_normal(120 * SAMPLE_RATE) * 3000).astype(np.int16)
    wavs = folder / "wavs"
    wavs.mkdir()
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as lines:
        lengths = np.maximum(length_set("LibriSpeech-like", num_utterances) // shortened, SAMPLE_RATE // 2)
        for number, num_samples in enumerate(lengths.tolist()):
            start = int(random.integers(0, len(noise) - num_samples))
            soundfile.write(wavs / f"{number}.wav", noise[start : start + num_samples], SAMPLE_RATE)
            letters = random.choice(_LETTERS, int(num_samples / SAMPLE_RATE * _LETTERS_A_SECOND))
            text = f"e{''.join(letters).strip()}"
            lines.write(json.dumps({"audio_filepath": f"wavs/{number}.wav", "text": text, "id": str(number)}) + "\n")
    values = {
        "name": "noise",
        "max_steps": 1,
        "data": {
            "train": {"kind": "jsonl", "path": str(folder / "manifest.jsonl")},
            "corpus_root": str(folder),
            "num_proc": 4 if num_utterances > 1000 else 1,
            "max_duration_s": 40,
        },
    }
    prepare(decode_recipe(values), progress=False)
    return values


# --- ours -------------------------------------------------------------------------------------------------------


class _Watch:
    """When each step began; after the timed ones, how often the host waited, and how long the device was idle."""

    def __init__(self, setup: Setup) -> None:
        self.begun: list[float] = []
        self.syncs: float | None = None
        self.idle_share: float | None = None
        self._first_watched = setup.warmup + setup.timed
        self._watched = ExitStack()

    def show(self, _: PhaseFile, phase: Phase, step: int | None = None) -> None:
        """In the place of `PhaseFile.show`: the loop calls it as a step begins, when the one before is done."""
        if phase == "step" and step == len(self.begun):
            return  # another unit
        number = len(self.begun)
        self.begun.append(time.monotonic())
        if not torch.cuda.is_available():
            return
        if number == self._first_watched:
            self._watched.enter_context(self._counting_syncs())
        elif number == self._first_watched + _WATCHED:
            self._watched.close()
            self._watched.enter_context(self._profiling())
        elif number == self._first_watched + 2 * _WATCHED:
            self._watched.close()

    @contextmanager
    def _counting_syncs(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield
            torch.cuda.set_sync_debug_mode("default")
        self.syncs = sum("synchronizing" in str(entry.message) for entry in caught) / _WATCHED

    @contextmanager
    def _profiling(self) -> Iterator[None]:
        torch.cuda.synchronize()
        start = time.monotonic()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            yield
            torch.cuda.synchronize()
            wall_s = time.monotonic() - start
        events: Any = found.events()
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        self.idle_share = 1 - busy_us(spans) / 1e6 / wall_s


def busy_us(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def train_ours(setup: Setup, corpus_values: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """The training program, whole, but for its checkpoint at the end; what was measured of its timed steps."""
    recipe = decode_recipe(setup.values(corpus_values, run_dir))
    watch = _Watch(setup)
    kernel = sdpa_kernel([KERNELS[setup.kernel]]) if setup.kernel else nullcontext()
    with (
        mock.patch.object(PhaseFile, "show", lambda *args: _only_steps(watch, *args)),
        mock.patch.object(Saver, "save", lambda *_, **__: None),
        kernel,
    ):
        asr_train.train.train(recipe)
    lines = [line for line in read_metrics(RunDir(run_dir)) if "step_time_s" in line]
    seconds = np.diff(watch.begun)[: setup.warmup + setup.timed]
    timed = slice(setup.warmup, setup.warmup + setup.timed)
    shapes = [(line["num_utterances"], line["padded_audio_s"]) for line in lines]
    is_unseen = np.array([shape not in shapes[:number] for number, shape in enumerate(shapes)])[timed]
    audio_s = np.array([line["audio_s"] for line in lines])[timed]
    elapsed_s = float(seconds[timed].sum())
    config = load_model_config(recipe.model).to_dict()
    corpus = Corpus.open(prepare(recipe, progress=False).path)
    lengths_s = corpus.train.num_samples / SAMPLE_RATE
    flops = training_flops_per_s(
        config,
        utterance_s=float((lengths_s**2).sum() / lengths_s.sum()),  # weighted as attention weighs it
        feature_encoder_frozen=recipe.model.freeze_feature_encoder,
    )
    return {
        "audio_s_per_s": float(audio_s.sum()) / elapsed_s,
        "tflops": float(audio_s.sum()) / elapsed_s * flops / 1e12,
        "step_ms": seconds[timed] * 1000,
        "is_unseen": is_unseen,
        "data_wait_share": sum(line["data_wait_s"] for line in lines[timed]) / elapsed_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory_bytes()["peak"],
        "syncs": watch.syncs,
        "idle_share": watch.idle_share,
        "last_loss": lines[-1]["loss"],
    }


def _only_steps(watch: _Watch, record: PhaseFile, phase: Phase, step: int | None = None) -> None:
    """Steps, and the first thing after the last one, which is no step."""
    if phase == "step" or watch.begun:
        watch.show(record, phase, step)


# --- theirs -----------------------------------------------------------------------------------------------------


class _Pads:
    """The guide's collator."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        values = [{"input_values": row["input_values"][0]} for row in rows]
        batch = self.processor.pad(values, padding="longest", return_tensors="pt")
        labels = self.processor.pad(
            labels=[{"input_ids": row["labels"]} for row in rows], padding="longest", return_tensors="pt"
        )
        batch["labels"] = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), -100)
        return batch


class _Times(TrainerCallback):  # type: ignore[misc]
    """When each step ended, on the device too."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended.append(time.monotonic())


def train_guide(
    shape: str, precision: str, corpus_values: Mapping[str, Any], folder: Path, *, epochs: int, tuned: bool
) -> dict[str, Any]:
    """Trainer with the guide's settings; `tuned` reads numpy arrays in four workers. One epoch is not counted."""
    datasets.disable_progress_bars()
    transformers.set_seed(0)
    recipe = decode_recipe({**corpus_values, "model": {"config": SHAPES[shape]}})
    corpus = prepare(recipe, progress=False)
    processor: Any = Wav2Vec2Processor.from_pretrained(corpus.processor_dir)
    steps_per_epoch = min(GUIDE_UTTERANCES, len(corpus.train)) // (GUIDE_BATCH * GUIDE_ACCUMULATION)
    chosen = list(range(steps_per_epoch * GUIDE_BATCH * GUIDE_ACCUMULATION))

    def encoded(entry: dict[str, Any]) -> Any:
        samples = corpus.train.waveform(entry["row"]).astype(np.float32) / 32768
        found = processor(samples, sampling_rate=SAMPLE_RATE, text=corpus.train.text(entry["row"]))
        found["input_length"] = len(found["input_values"][0])
        return found

    rows: Any = datasets.Dataset.from_dict({"row": chosen}).map(encoded, remove_columns=["row"])
    config = load_model_config(recipe.model, vocabulary=corpus.vocabulary)
    config.ctc_loss_reduction, config.ctc_zero_infinity, config.layerdrop = "mean", True, 0.0
    times = _Times()
    is_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=GUIDE_BATCH, gradient_accumulation_steps=GUIDE_ACCUMULATION,
        learning_rate=1e-5, warmup_steps=500, max_steps=(epochs + 1) * steps_per_epoch, gradient_checkpointing=True,
        fp16=is_gpu and precision == "fp16", bf16=precision == "bf16", train_sampling_strategy="group_by_length",
        logging_steps=25, report_to="none", save_strategy="no", use_cpu=not is_gpu, disable_tqdm=True,
        dataloader_num_workers=4 if tuned else 0, dataloader_persistent_workers=tuned,
    )  # fmt: skip
    trainer: Any = Trainer(
        model=AutoModelForCTC.from_config(config),
        args=arguments,
        train_dataset=rows.with_format("numpy") if tuned else rows,
        processing_class=processor,
        data_collator=_Pads(processor),
        callbacks=[times],
    )
    trainer.model_accepts_loss_kwargs = False  # else its gradients grow with the accumulation
    trainer.train()
    elapsed_s = times.ended[-1] - times.ended[steps_per_epoch - 1]
    audio_s = epochs * float(corpus.train.num_samples[chosen].sum()) / SAMPLE_RATE
    return {
        "audio_s_per_s": audio_s / elapsed_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_gpu else memory_bytes()["peak"],
    }


# --- parts of a step --------------------------------------------------------------------------------------------


def matrix_tflops(precision: str, size: int, repeats: int) -> float:
    """What a plain product of square matrices reaches on this device: the peak that shares are of."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    first, second = (torch.randn(size, size, device=device, dtype=kinds[precision]) for _ in range(2))
    seconds = _seconds(lambda: first @ second, repeats)
    return 2 * size**3 / float(np.median(seconds)) / 1e12


def ctc_ms(backend: str, num_utterances: int, num_frames: int, num_labels: int, repeats: int) -> float:
    """Milliseconds of the training's CTC loss, forward and backward, of one unit, by one of its two kernels.

    Raises:
        ModelError: cuDNN does not take this.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(num_utterances, num_frames, 32, device=device, requires_grad=True)
    labels = torch.randint(1, 32, (num_utterances * num_labels,))
    frames, counts = (torch.full((num_utterances,), value) for value in (num_frames, num_labels))
    labels = labels.to(device)
    kernel: Backend = "cudnn" if backend == "cudnn" else "torch"
    if kernel == "cudnn" and not fits_cudnn(logits, frames, counts, 0):
        raise ModelError("cuDNN does not take this")

    def both_ways() -> None:
        losses, _ = ctc_losses(logits, frames, labels, counts, 0, backend=kernel)
        torch.autograd.grad(losses.sum(), logits)

    return float(np.median(_seconds(both_ways, repeats))) * 1000


def _seconds(work: Any, repeats: int) -> list[float]:
    found = []
    for _ in range(3 + repeats):
        start = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.monotonic() - start)
    return found[3:]


def device_name() -> dict[str, Any] | None:
    """The GPU, if there is one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "has_triton": importlib.util.find_spec("triton") is not None,
    }
