"""Ways to train the same model on the same speech: ours, transformers' Trainer twice, accelerate, and a bare loop.

Each runs without end in processes of its own, one a rank, and calls `Baton.step_done` after every step; there it waits
until it is its turn again.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from measuring import memory_bytes
from throughput_data import Speech, recipe_values
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter
from transformers import (
    AutoModelForCTC,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2Processor,
    get_scheduler,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder
from transformers.trainer_pt_utils import LengthGroupedSampler

import asr_train.train
from asr_train.data.batch import input_values, make_batch
from asr_train.data.plan import Plan
from asr_train.errors import WavefleetError
from asr_train.loss import ctc_losses
from asr_train.model import build_model
from asr_train.phase import Phase, PhaseFile
from asr_train.prepare import prepare
from asr_train.recipe import decode_recipe
from asr_train.train import plan_of

_FOR_EVER = 1_000_000  # steps
_LEARNING_RATE, _WARMUP_STEPS, _MAX_NORM = 1e-5, 500, 1.0  # the guide's; and Trainer's default


@dataclass(frozen=True)
class Tuning:
    """What an expert chooses; utterances a step stay as they are."""

    batch: int  # utterances; of ours, seconds as those of so many utterances
    workers: int = 1


@dataclass(frozen=True)
class Task:
    """What is trained, and by how many processes."""

    speech: Speech
    size: str  # of the model
    batch: int  # utterances a batch in the guide
    accumulation: int
    world_size: int
    trainer: Tuning
    ours: Tuning  # of the bare loop too
    folder: Path  # to write into

    @property
    def model(self) -> Path:
        """A folder of transformers."""
        return self.speech.model

    @property
    def batches(self) -> list[int]:
        """Utterances a batch that an expert tries: a step in 8, 4, 2 parts or one."""
        step = self.batch * self.accumulation
        return [step // parts for parts in (8, 4, 2, 1) if parts <= step]

    @property
    def units(self) -> int:
        """Of ours, a step and rank."""
        return self.batch * self.accumulation // self.ours.batch

    @property
    def recipe_values(self) -> dict[str, Any]:
        """Our recipe: a step of as much audio as the guide's, on average."""
        step_s = self.batch * self.accumulation * self.speech.audio_s / self.speech.utterances
        return {
            **self.speech.source,
            **recipe_values(self.size),
            "model": {"pretrained": str(self.model), "layerdrop": 0.0},
            "unit_audio_s": step_s / self.units,
            "units_per_step": self.units * self.world_size,
            "optim": {"lr": _LEARNING_RATE, "schedule": "linear", "warmup_steps": _WARMUP_STEPS},
        }


class Slice(NamedTuple):
    """Some steps of one rank, from when it was let go until the last of them was done."""

    begin_s: float
    end_s: float
    steps: int
    samples: int  # of utterances
    padded_samples: int  # with their padding
    data_wait_s: float
    cpu_s: float  # of the process and its workers
    memory_bytes: int  # peak of the process, and what its workers have of their own


class Baton:
    """Lets this process train so many steps when it is its turn; while it waits its loader's workers stand still."""

    def __init__(self, connection: Connection, begin_s: float) -> None:
        self._connection = connection
        self._left = 1  # the first step, start-up in it, comes by itself
        self._begin(1, begin_s)
        self._watch()

    def _begin(self, steps: int, begin_s: float) -> None:
        self._left = self._steps = steps
        self._begin_s = begin_s
        self._samples = self._padded_samples = 0
        self._data_wait_s = 0.0
        self._begin_cpu_s = _cpu_s(psutil.Process().children())

    def step_done(self) -> None:
        """A step is over; returns when the next one may begin."""
        self._left -= 1
        if self._left:
            return
        end_s = time.monotonic()
        workers = psutil.Process().children()
        cpu_s = _cpu_s(workers) - self._begin_cpu_s
        for worker in workers:
            worker.suspend()
        memory = memory_bytes()["peak"] + sum(worker.memory_full_info().uss for worker in workers)
        counts = self._samples, self._padded_samples, self._data_wait_s, cpu_s
        self._connection.send(Slice(self._begin_s, end_s, self._steps, *counts, memory))
        steps = self._connection.recv()
        for worker in workers:
            worker.resume()
        self._begin(steps, time.monotonic())

    def _watch(self) -> None:
        """Count what goes into the model, and the time in loaders' `next`, in the same way for all."""
        forward, following = Wav2Vec2FeatureEncoder.forward, _BaseDataLoaderIter.__next__

        def counted_forward(encoder: Any, values: torch.Tensor) -> Any:
            rows = values.detach().numpy()  # zero behind an utterance's end, and there alone
            self._samples += sum(len(row) - int(np.argmax(row[::-1] != 0)) for row in rows)
            self._padded_samples += rows.size
            return forward(encoder, values)

        def timed_next(iterator: Any) -> Any:
            start = time.monotonic()
            try:
                return following(iterator)
            finally:
                self._data_wait_s += time.monotonic() - start

        Wav2Vec2FeatureEncoder.forward = counted_forward
        _BaseDataLoaderIter.__next__ = timed_next


def _cpu_s(workers: list[psutil.Process]) -> float:
    """Time that this process and its workers have computed, so far."""
    times = [os.times(), *(worker.cpu_times() for worker in workers)]
    return sum(each.user + each.system for each in times)


# --- ours -------------------------------------------------------------------------------------------------------


def train_ours(task: Task, baton: Baton) -> None:
    """The training program, whole: a run directory, one loader worker, a line each 10 steps."""

    class Watched(PhaseFile):
        """Sees each step begin, when everything of the one before is done."""

        begun: int | None = None

        def show(self, phase: Phase, step: int | None = None) -> None:
            super().show(phase, step)
            if phase == "step" and step != self.begun:
                if self.begun is not None:
                    baton.step_done()
                self.begun = step

    class Phases:
        """In the place of the class, whose only use there is this."""

        @staticmethod
        def from_environment(environ: Any) -> PhaseFile:
            return Watched(None, int(environ.get("RANK", "0")))

    asr_train.train.PhaseFile = Phases  # type: ignore[assignment, misc]
    run_dir = str(task.folder / f"run-{task.world_size}-{os.environ.get('MASTER_PORT', os.getpid())}")
    asr_train.train.train(decode_recipe({**task.recipe_values, "run_dir": run_dir}))


def train_bare(task: Task, baton: Baton) -> None:
    """Our units, made beforehand and kept as float tensors; forward, backward, clipping, AdamW, and nothing else."""
    recipe = decode_recipe(task.recipe_values)
    corpus = prepare(recipe, progress=False)
    module = build_model(recipe, corpus.vocabulary, say=lambda text: None)
    plan = plan_of(recipe, corpus)
    model: Any = module
    rank = int(os.environ.get("RANK", "0"))
    if task.world_size > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    steps = _in_memory(plan, corpus, module, rank, task.world_size)
    optimizer = torch.optim.AdamW(module.parameters(), lr=_LEARNING_RATE, fused=True)
    while True:
        for num_utterances, units in steps:
            for place, (values, batch) in enumerate(units):
                is_last = place == len(units) - 1
                with nullcontext() if is_last or task.world_size == 1 else model.no_sync():
                    logits = model(values, batch.num_samples)
                    losses, _ = ctc_losses(
                        logits, batch.num_frames, batch.labels, batch.num_labels, corpus.vocabulary.blank_id
                    )
                    (losses.sum() / num_utterances).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), _MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            baton.step_done()


def _in_memory(plan: Plan, corpus: Any, module: Any, rank: int, world_size: int) -> list[tuple[int, list[Any]]]:
    """An epoch of steps: utterances of all ranks, and this rank's units with their waveforms."""
    steps = []
    for step in _full_steps(plan, world_size):
        units = plan.step_units(0, step)[rank::world_size]
        batches = [make_batch(corpus.train, unit, module.batch_settings, seed=None) for unit in units]
        steps.append((plan.num_utterances_in(0, step), [(input_values(batch), batch) for batch in batches]))
    return steps


def _full_steps(plan: Plan, world_size: int) -> list[int]:
    """The steps of an epoch in which no rank is idle."""
    found = [step for step in range(plan.steps_per_epoch) if plan.num_units_in(0, step) >= world_size]
    if not found:
        raise WavefleetError(f"no step of the plan has a unit for each of {world_size} ranks: train on more utterances")
    return found


def epoch_steps(variant: str, task: Task) -> int:
    """Steps in which a variant sees every utterance once; `group_by_length` has the longest ones first."""
    if variant not in ("ours", "bare"):
        return max(1, round(task.speech.utterances / (task.batch * task.accumulation * task.world_size)))
    recipe = decode_recipe(task.recipe_values)
    plan = plan_of(recipe, prepare(recipe, progress=False))
    return plan.steps_per_epoch if variant == "ours" else len(_full_steps(plan, task.world_size))


# --- theirs -----------------------------------------------------------------------------------------------------


class _Pads:
    """The guide's collator: rows of the data set, padded by the processor; -100 where labels are padding."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.processor.pad(
            [{"input_values": row["input_values"][0]} for row in rows], padding="longest", return_tensors="pt"
        )
        labels = self.processor.pad(
            labels=[{"input_ids": row["labels"]} for row in rows], padding="longest", return_tensors="pt"
        )
        batch["labels"] = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), -100)
        return batch


class _PadsArrays:
    """The same from flat numpy arrays, without a Python list of samples anywhere."""

    def __init__(self, with_mask: bool) -> None:
        self.with_mask = with_mask

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values = _stacked([row["input_values"] for row in rows], 0.0, np.float32)
        labels = _stacked([row["labels"] for row in rows], -100, np.int64)
        batch = {"input_values": torch.from_numpy(values), "labels": torch.from_numpy(labels)}
        if self.with_mask:
            lengths = np.array([len(row["input_values"]) for row in rows])
            mask = np.arange(values.shape[1]) < lengths[:, None]
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int32))
        return batch


def _stacked(arrays: list[Any], padding: float, kind: Any) -> Any:
    stacked = np.full((len(arrays), max(map(len, arrays))), padding, dtype=kind)
    for row, array in enumerate(arrays):
        stacked[row, : len(array)] = array
    return stacked


class _Watches(TrainerCallback):
    """Tells the baton of each step."""

    def __init__(self, baton: Baton) -> None:
        self.baton = baton

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.baton.step_done()


class _KnowsLengths(Trainer):
    """Gives its own sampler the lengths as a list; from their column it reads each with its waveform, several times."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(step, lengths=rows.data.column("length").to_pylist())


def _rows(path: Path, copies: int) -> datasets.Dataset:
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path))] * copies)


def train_guide(task: Task, baton: Baton) -> None:
    """Trainer with the settings of the guide, all but fp16 and gradient checkpointing, in single precision here."""
    processor: Any = Wav2Vec2Processor.from_pretrained(task.model)
    arguments = _arguments(task, per_device_train_batch_size=task.batch, gradient_accumulation_steps=task.accumulation)
    trainer = Trainer(
        model=AutoModelForCTC.from_pretrained(task.model, dtype=torch.float32),
        args=arguments,
        train_dataset=_rows(task.speech.nested, task.speech.copies),
        processing_class=processor,
        data_collator=_Pads(processor),
        callbacks=[_Watches(baton)],
    )
    _train(trainer, task)


def train_tuned(task: Task, baton: Baton) -> None:
    """Trainer as an expert has it: numpy arrays, lengths in a column, workers, the batch that suits it best."""
    processor: Any = Wav2Vec2Processor.from_pretrained(task.model)
    tuning = task.trainer
    step = task.batch * task.accumulation
    with_workers = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4} if tuning.workers else {}
    arguments = _arguments(
        task, per_device_train_batch_size=tuning.batch, gradient_accumulation_steps=max(1, step // tuning.batch),
        dataloader_num_workers=tuning.workers, dataloader_pin_memory=False, remove_unused_columns=False,
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False, **with_workers,
    )  # fmt: skip
    trainer = _KnowsLengths(
        model=AutoModelForCTC.from_pretrained(task.model, dtype=torch.float32),
        args=arguments,
        train_dataset=_rows(task.speech.flat, task.speech.copies).with_format("numpy"),
        data_collator=_PadsArrays(bool(processor.feature_extractor.return_attention_mask)),
        callbacks=[_Watches(baton)],
    )
    _train(trainer, task)


def _arguments(task: Task, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(task.folder / "trainer"), use_cpu=True, report_to="none", save_strategy="no",
        train_sampling_strategy="group_by_length", learning_rate=_LEARNING_RATE, warmup_steps=_WARMUP_STEPS,
        max_steps=_FOR_EVER, logging_steps=25, **changes,
    )  # fmt: skip


def _train(trainer: Trainer, task: Task) -> None:
    assert trainer.accelerator.num_processes == task.world_size, "accelerate is alone"
    trainer.model_accepts_loss_kwargs = False  # else gradients grow with accumulation steps and processes
    trainer.train()


def train_accelerate(task: Task, baton: Baton) -> None:
    """A loop in the style of transformers' no_trainer examples: shuffled batches, `accumulate`, a prepared schedule."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.accumulation)
    assert accelerator.num_processes == task.world_size, "accelerate is alone"
    set_seed(0)
    processor: Any = Wav2Vec2Processor.from_pretrained(task.model)
    model: Any = AutoModelForCTC.from_pretrained(task.model, dtype=torch.float32)
    rows: Any = _rows(task.speech.nested, task.speech.copies)
    loader: Any = DataLoader(rows, shuffle=True, collate_fn=_Pads(processor), batch_size=task.batch)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    schedule: Any = get_scheduler("linear", optimizer, num_warmup_steps=_WARMUP_STEPS, num_training_steps=_FOR_EVER)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for batch in _for_ever(loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), _MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            baton.step_done()


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


@dataclass(frozen=True)
class Variant:
    """A way to train, and its name in the tables."""

    name: str
    train: Callable[[Task, Baton], None]


VARIANTS = {
    "guide": Variant("Trainer, the guide as written", train_guide),
    "tuned": Variant("Trainer, tuned by an expert", train_tuned),
    "accelerate": Variant("accelerate, a plain loop", train_accelerate),
    "ours": Variant("ours", train_ours),
    "bare": Variant("a bare loop over our units in memory", train_bare),
}
