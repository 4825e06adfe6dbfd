"""`python benchmarks/syncs.py`: how often a step makes the host wait for the device, ours and transformers' Trainer's.

Both train a small model on the same utterances with their own loops; `sync_counter.py` counts their calls. Without a
GPU everything is on the CPU, and counted as if it were not.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
from guide import Collator, prepared, processor_of
from measuring import apart, count, hardware, markdown, shown_bars, versions
from sync_counter import SyncCounter, self_test
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.utils import logging as transformers_logging

from asr_train import strategy
from asr_train.data.corpus import Corpus
from asr_train.errors import EXIT_DONE, run_main
from asr_train.files import write_json
from asr_train.geometry import SAMPLE_RATE
from asr_train.phase import PhaseFile
from asr_train.prepare import prepare
from asr_train.recipe import decode_recipe
from asr_train.train import train

RESULTS = Path(__file__).resolve().parent / "results" / "syncs.json"
SIDES = {"ours": "ours", "guide": "Trainer, the guide's settings", "tuned": "Trainer, tuned"}
BARS = {"fp32": 1, "bf16": 1, "fp16": 2}  # expected of ours, outside logging steps
NUM_UNITS = 4  # a step; batches of as many utterances a step with Trainer
LOG_EVERY = 4
WARM_UP = 2  # steps that make buffers and the optimizer's state
_LIBRARIES = ("wavefleet", "torch", "transformers", "accelerate", "datasets", "numpy")
_WORDS = ("red", "green", "blue", "one", "two", "three")
_MODEL = {  # with an attention mask, SpecAugment, dropout and dropped layers, as transformers has them by itself
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/syncs.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=count, default=24, help="of each training (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="few trainings of few steps: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    num_steps = 7 if arguments.smoke else arguments.steps
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    transformers_logging.disable_progress_bar()
    is_gpu = apart(torch.cuda.is_available)
    machine = hardware() | {"gpu": apart(torch.cuda.get_device_name) if is_gpu else None}
    kinds = apart(partial(self_test, torch.device("cuda" if is_gpu else "cpu")))
    of_trainer = ("fp32", "bf16", "fp16") if is_gpu else ("fp32", "bf16")
    runs = [("ours", precision) for precision in BARS]
    runs += [(side, precision) for side in ("guide", "tuned") for precision in of_trainer]
    if arguments.smoke:
        runs = [("ours", "fp32"), ("ours", "fp16"), ("guide", "fp32")]
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as name:
        folder = Path(name)
        manifest = write_utterances(folder / "speech", num_utterances=64)
        corpus = prepare(make_recipe(folder, manifest, "fp32", num_steps), progress=False)
        prepared(corpus, folder / "guide")  # once, so that all find it
        rows = []
        for side, precision in runs:
            print(f"{SIDES[side]}, {precision}", file=sys.stderr, flush=True)
            run = partial(run_trainer, folder, corpus.path, is_tuned=side == "tuned")
            if side == "ours":
                run = partial(run_ours, folder, manifest)
            run = partial(run, precision=precision, num_steps=num_steps, is_gpu=is_gpu)
            rows.append({"side": side, "precision": precision, **summarise(apart(run))})
    result: dict[str, Any] = {
        "benchmark": "syncs",
        "device": "cuda" if is_gpu else "cpu, counted as if it were a GPU",
        "units_per_step": NUM_UNITS,
        "steps": num_steps,
        "log_every": LOG_EVERY,
        "self_test": kinds,
        "hardware": machine,
        "versions": versions(*_LIBRARIES),
        "rows": rows,
    }
    result["bars"] = bars(rows)
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


# --- what is trained ----------------------------------------------------------------------------------------------


def write_utterances(folder: Path, num_utterances: int) -> Path:
    """Noise of 1 to 3 s with a text each; the manifest."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for number in range(num_utterances):
        samples = (1000 * generator.standard_normal(int(generator.uniform(1, 3) * SAMPLE_RATE))).astype(np.int16)
        soundfile.write(folder / f"{number}.wav", samples, SAMPLE_RATE)
        lines.append({"audio_filepath": f"{number}.wav", "text": " ".join(generator.choice(_WORDS, 2))})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return manifest


def make_recipe(folder: Path, manifest: Path, precision: str, num_steps: int) -> Any:
    """Units of two utterances, four a step."""
    return decode_recipe(
        {
            "name": "syncs", "run_dir": str(folder / f"run-{precision}"), "max_steps": num_steps,
            "order": "random", "unit_utterances": 2, "units_per_step": NUM_UNITS, "num_workers": 1,
            "precision": precision,
            "data": {"train": {"kind": "jsonl", "path": str(manifest)}, "corpus_root": str(folder), "num_proc": 1},
            "model": {"architecture": "wav2vec2", "config": _MODEL},
            "checkpoint": {"every": str(10 * num_steps), "keep_best": 0}, "log": {"every": LOG_EVERY},
        }
    )  # fmt: skip


@dataclass
class Steps:
    """What was counted in each step: from its beginning to that of the next."""

    counts: dict[int, Counter[str]] = field(default_factory=dict)
    kernel_waits: dict[int, int] = field(default_factory=dict)
    warned: dict[int, int] | None = None  # on a GPU

    def begin(self, counter: SyncCounter, step: int) -> None:
        """Take what was counted for the step before, and begin another."""
        if self.counts:
            last = max(self.counts)
            self.counts[last], self.kernel_waits[last] = counter.counts.copy(), counter.kernel_waits
            if self.warned is not None:
                self.warned[last] = counter.warned
        counter.counts.clear()
        counter.kernel_waits = counter.warned = 0
        counter.forget_freed()
        self.counts[step] = Counter()

    def measured(self, *, is_logging: bool) -> list[int]:
        """Steps after the warm-up and before the last, which ends with the training."""
        return [step for step in sorted(self.counts)[WARM_UP:-1] if (step % LOG_EVERY == 0) == is_logging]


def run_ours(folder: Path, manifest: Path, *, precision: str, num_steps: int, is_gpu: bool) -> Steps:
    """Our program, from recipe to done, counted step by step."""
    torch.set_num_threads(1)
    counter, steps = SyncCounter(is_gpu=is_gpu), Steps(warned={} if is_gpu else None)
    show = PhaseFile.show

    def show_and_count(phase: PhaseFile, name: Any, step: int | None = None) -> None:
        show(phase, name, step)
        if name == "step" and step is not None and step not in steps.counts:
            steps.begin(counter, step)

    recipe = make_recipe(folder, manifest, precision, num_steps)
    with mock.patch.object(PhaseFile, "show", show_and_count), _without_gpu(precision, is_gpu=is_gpu), counter:
        train(recipe)
    return steps


@contextmanager
def _without_gpu(precision: str, *, is_gpu: bool) -> Iterator[None]:
    """fp16 on a CPU, where accelerate silently makes fp32 of it and our program refuses: its scaler and autocast."""
    if precision != "fp16" or is_gpu:
        yield
        return
    make = strategy.make_accelerator

    def make_with_scaler(*arguments: Any) -> Any:
        accelerator = make(*arguments)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator

    with (
        mock.patch.object(strategy, "make_accelerator", make_with_scaler),
        mock.patch.object(strategy, "check_environment", lambda recipe: None),
    ):
        yield


def run_trainer(folder: Path, corpus: Path, *, precision: str, num_steps: int, is_gpu: bool, is_tuned: bool) -> Steps:
    """The Trainer of transformers with the guide's settings, but for its sizes; or with those that wait less."""
    torch.set_num_threads(1)
    counter, steps = SyncCounter(is_gpu=is_gpu), Steps(warned={} if is_gpu else None)

    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.begin(counter, state.global_step + 1)

    opened = Corpus.open(corpus)
    processor = processor_of(opened)
    config = Wav2Vec2Config(
        **_MODEL, vocab_size=opened.vocabulary.size, pad_token_id=opened.vocabulary.blank_id, ctc_loss_reduction="mean"
    )
    if is_tuned:
        tuning = {"accelerator_config": {"non_blocking": True}, "logging_nan_inf_filter": False}
    else:
        tuning = {"gradient_checkpointing": True}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=num_steps, per_device_train_batch_size=2,
        gradient_accumulation_steps=NUM_UNITS, learning_rate=1e-5, warmup_steps=500, logging_steps=LOG_EVERY,
        train_sampling_strategy="group_by_length", length_column_name="input_length", remove_unused_columns=False,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not is_gpu, bf16=precision == "bf16",
        fp16=precision == "fp16", dataloader_num_workers=1, **tuning,
    )  # fmt: skip
    with counter:
        trainer = Trainer(
            model=Wav2Vec2ForCTC(config),
            args=arguments,
            data_collator=Collator(processor),
            train_dataset=prepared(opened, folder / "guide"),
            callbacks=[Count()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = False  # else it divides wrongly; its waits are the same
        trainer.train()
    return steps


# --- what is shown ------------------------------------------------------------------------------------------------


def summarise(steps: Steps) -> dict[str, Any]:
    """Waits a step, outside logging steps and in them, and of which kinds they are."""
    usual, logging = steps.measured(is_logging=False), steps.measured(is_logging=True)
    total = {step: sum(found.values()) for step, found in steps.counts.items()}
    kinds = sum((steps.counts[step] for step in usual), Counter[str]())
    return {
        "syncs": statistics.median(total[step] for step in usual),
        "syncs_most": max(total[step] for step in usual),
        "syncs_logging_most": max(total[step] for step in logging),
        "kinds": {kind: number / len(usual) for kind, number in kinds.most_common()},
        "in_kernels": statistics.median(steps.kernel_waits[step] for step in usual),
        "warned": None if steps.warned is None else statistics.median(steps.warned[step] for step in usual),
    }


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was expected of ours, and whether it was found."""
    return [
        {"bar": f"ours, {row['precision']}: most waits of a step outside logging steps", "at_most": limit,
         "found": row["syncs_most"], "met": row["syncs_most"] <= limit}
        for row in rows if row["side"] == "ours" and (limit := BARS[row["precision"]])
    ]  # fmt: skip


def render(result: dict[str, Any]) -> str:
    """The table, and the bars, as Markdown."""
    columns = ("training", "precision", "waits a step", "most", "most, logging step", "of which kinds, a step",
               "in CTC's kernel on a GPU", "torch's own count")  # fmt: skip
    table = [
        [
            SIDES[row["side"]],
            row["precision"],
            f"{row['syncs']:g}",
            f"{row['syncs_most']:g}",
            f"{row['syncs_logging_most']:g}",
            ", ".join(f"{number:.3g} {kind}" for kind, number in row["kinds"].items()) or "none",
            f"{row['in_kernels']:g}",
            "no GPU" if row["warned"] is None else f"{row['warned']:g}",
        ]
        for row in result["rows"]
    ]
    machine = result["hardware"]
    lines = [
        *markdown(columns, table, num_left=2),
        "",
        f"Device: {result['device']}; {machine['gpu'] or machine['cpu']}; {result['units_per_step']} units or batches a"
        f" step, {result['steps']} steps, the first {WARM_UP} and the last left out; a logging step is every"
        f" {result['log_every']}th. Self-test: one each of {', '.join(result['self_test'])}: counted.",
        "",
        *shown_bars(result["bars"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
