"""`python benchmarks/checkpoint.py`: how long training stands still for a checkpoint, and how long to find its place.

Saving: the state of wav2vec2-base with Adam, 1.1 GB, by ours (asynchronous and synchronous), `torch.save`,
`accelerate`'s `save_state` and transformers' `Trainer`. Resuming: the next batch at 90 % of an epoch of 10 million
utterances, by ours and by `Trainer`. benchmarks/README.md says what is timed.
"""

import argparse
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from accelerate import skip_first_batches
from datasets import Dataset, disable_progress_bars, load_from_disk
from measuring import apart, count, hardware, markdown, shown, shown_bars, spread, versions
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from asr_train import strategy
from asr_train.checkpoint import Ranks, Saver
from asr_train.config import CheckpointSettings, Recipe
from asr_train.data.lengths import LengthIndex
from asr_train.data.loader import RankTurns, Turn, open_loader
from asr_train.data.plan import Plan, PlanSettings
from asr_train.data.text import Vocabulary
from asr_train.errors import EXIT_DONE, run_main
from asr_train.files import write_json
from asr_train.geometry import SAMPLE_RATE
from asr_train.live_state import create_state, live_tensors
from asr_train.model import build_model
from asr_train.optim import build_optimizer
from asr_train.recipe import decode_recipe
from asr_train.state import TrainState
from asr_train.strategy import Parallel

RESULTS = Path(__file__).resolve().parent / "results" / "checkpoint.json"
SAVERS = {
    "async": "ours, asynchronous",
    "sync": "ours, synchronous",
    "torch": "torch.save",
    "accelerate": "accelerate.save_state",
    "trainer": "Trainer._save_checkpoint",
}
RESUMERS = {"ours": "ours", "random": "Trainer, random", "grouped": "Trainer, group_by_length, 1 % of them"}
GROUPED_SHARE = 100  # a hundredth of the utterances for group_by_length, which takes some 0.1 ms for each
MAX_BLOCKED, MAX_GROWTH = 0.2, 1.5  # expected: share of torch.save's time; time at 90 % beside that at 0 %
POSITIONS = (0.0, 0.9)  # of an epoch
BATCH = 8  # utterances a batch, as in the guides
SMOKE = {  # two layers of 16 channels
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_KEPT: list[Parallel] = []  # torch 2.13: DDP's destructor waits, with the GIL, for a thread of gloo that may want it
_LIBRARIES = ("wavefleet", "torch", "accelerate", "transformers", "datasets", "safetensors", "numpy", "xxhash")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "DS_ACCELERATOR": "cpu",
}


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/checkpoint.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=6, help="timed saves each (default: %(default)s)")
    parser.add_argument("--resume-rounds", type=count, default=4, help="timed resumes each (default: %(default)s)")
    parser.add_argument(
        "--utterances", type=count, default=10_000_000, help="of the epoch to resume in (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the temporary folder)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few utterances, one round: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    rounds, resume_rounds, utterances = arguments.rounds, arguments.resume_rounds, arguments.utterances
    if arguments.smoke:
        rounds, resume_rounds, utterances = 1, 1, 2_000
    os.environ |= _ENVIRONMENT
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # what accelerate's launcher sets for each process
    machine = hardware()
    config = SMOKE if arguments.smoke else {}
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        saves = {str(number): measure_saves(number, folder, config, rounds) for number in (1, 2)}
        write_lengths(folder / "all", utterances)
        write_lengths(folder / "few", max(utterances // GROUPED_SHARE, 10 * BATCH))
        resumes = apart(partial(measure_resumes, folder, resume_rounds))
    result: dict[str, Any] = {
        "benchmark": "checkpoint",
        "rounds": rounds,
        "resume_rounds": resume_rounds,
        "utterances": utterances,
        "hardware": machine,
        "versions": versions(*_LIBRARIES),
        "saves": saves,
        "resumes": resumes,
    }
    result["bars"] = bars(result)
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


# --- saving -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """One save: how long the caller waited, and how long until it was on disk (ours: and read again)."""

    blocked_s: float
    safe_s: float


Save = Callable[[int], Timed]  # takes the number of the step


def measure_saves(world_size: int, folder: Path, config: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Blocked seconds by every way of saving, of `world_size` processes, each a copy of this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = folder / f"saves-{world_size}"
    where.mkdir()
    context = multiprocessing.get_context("fork")
    pools = [ProcessPoolExecutor(1, context) for _ in range(world_size)]
    ranks = [
        pool.submit(_save_as_rank, rank, world_size, port, where, config, rounds) for rank, pool in enumerate(pools)
    ]
    over, _ = wait(ranks, return_when=FIRST_EXCEPTION)
    if any(rank.exception() for rank in over):  # the others would wait for it for ever
        for process in psutil.Process().children():
            process.kill()
    found, *_ = [rank.result() for rank in sorted(over, key=ranks.index)]
    for pool in pools:
        pool.shutdown()
    shutil.rmtree(where)
    return found


def _save_as_rank(
    rank: int, world_size: int, port: int, folder: Path, config: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """What one process of them does; the slowest one's times, on all."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    parallel = make_parallel(config, folder)
    _KEPT.append(parallel)
    ways = make_ways(parallel, folder)
    first = {way: _timed(folder, save, 0) for way, save in ways.items()}  # warm-up: buffers are made
    runs: dict[str, list[Timed]] = {way: [] for way in ways}
    for number in range(rounds):  # ABCDE EDCBA
        for way in ways if number % 2 == 0 else reversed(ways):
            runs[way].append(_timed(folder, ways[way], number + 1))
    blocked_s = {way: [timed.blocked_s for timed in found] for way, found in runs.items()}
    tensors = live_tensors(parallel).values()
    return {
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "parameters": sum(parameter.numel() for parameter in parallel.module.parameters()),
        "ways": {
            way: {
                "first_blocked_s": first[way].blocked_s,
                "blocked_s": spread(blocked_s[way]),
                "safe_s": spread([timed.safe_s for timed in runs[way]]),
                "of_torch_save": spread(
                    [ours / theirs for ours, theirs in zip(blocked_s[way], blocked_s["torch"], strict=True)]
                ),
            }
            for way in ways
        },
    }


def make_parallel(config: dict[str, Any], folder: Path) -> Parallel:
    """A wav2vec2 model of random weights, base if `config` changes nothing, and Adam's moments, none of them zero."""
    recipe: Recipe = decode_recipe(
        {
            "name": "benchmark",
            "max_steps": 1,
            "data": {"train": {"kind": "demo", "split": "train"}},
            "model": {"architecture": "wav2vec2", "config": config},
        }
    )
    vocabulary = Vocabulary.build(["abcdefghijklmnopqrstuvwxyz '"])
    model = build_model(recipe, vocabulary, say=lambda text: None)
    accelerator = strategy.make_accelerator(recipe, str(folder))
    parallel = strategy.prepare(accelerator, model, build_optimizer(model, recipe.optim), recipe)
    create_state(parallel)
    for name, tensor in live_tensors(parallel).items():
        if name.endswith((".exp_avg", ".exp_avg_sq")):  # pages of zeros would be copied faster than any others
            tensor.normal_().abs_()
    return parallel


def make_ways(parallel: Parallel, folder: Path) -> dict[str, Save]:
    """Ways to save the same tensors."""
    ranks = Ranks(parallel)
    ways: dict[str, Save] = {
        "async": _ours(parallel, ranks, folder / "async", asynchronous=True),
        "sync": _ours(parallel, ranks, folder / "sync", asynchronous=False),
        "torch": partial(_timed_call, partial(_torch_save, parallel), folder / "theirs" / "torch"),
        "accelerate": partial(_timed_call, parallel.accelerator.save_state, folder / "theirs" / "accelerate"),
    }
    if parallel.world_size == 1:
        output = folder / "theirs" / "trainer"
        trainer = _trainer(parallel, output)
        save = partial(trainer._save_checkpoint, trainer.model_wrapped, None)
        ways["trainer"] = partial(_timed_call, lambda _: save(), output)
    return ways


def _ours(parallel: Parallel, ranks: Ranks, folder: Path, *, asynchronous: bool) -> Save:
    """The saver of a run, which keeps its newest checkpoint."""
    folder.mkdir(exist_ok=True)
    settings = CheckpointSettings(keep_last=1, keep_best=0, asynchronous=asynchronous)
    saver = Saver(folder, parallel, ranks, settings, {"attempt": 1})

    def save(step: int) -> Timed:
        start = time.monotonic()
        saver.save(replace(TrainState(), step=step))
        blocked_s = time.monotonic() - start
        saver.wait()
        result = saver.take_result()
        assert result is not None, "it was waited for"
        if result.problem is not None:
            raise OSError(result.problem)
        return Timed(blocked_s, result.seconds)

    return save


def _torch_save(parallel: Parallel, folder: Path) -> None:
    if parallel.rank == 0:
        folder.mkdir(parents=True)
        state = {"model": parallel.module.state_dict(), "optimizer": parallel.optimizer.state_dict()}
        torch.save(state, folder / "state.pt")


def _trainer(parallel: Parallel, folder: Path) -> Trainer:
    """A Trainer of the same model and optimizer, after one step of training."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, logging_strategy="no",
    )  # fmt: skip
    noise = {"input_values": torch.randn(SAMPLE_RATE), "labels": torch.tensor([3, 4, 5])}
    model: Any = parallel.module.hf
    trainer = Trainer(model=model, args=arguments, train_dataset=[noise], optimizers=(parallel.optimizer, None))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _timed_call(save: Callable[[Path], Any], folder: Path, _: int) -> Timed:
    """Save into a folder that is not there; the second time is when all its files are on disk, if one waited."""
    start = time.monotonic()
    save(folder)
    blocked_s = time.monotonic() - start
    for path in folder.rglob("*"):
        if path.is_file():
            # safetensors writes aside and renames: what another rank is writing may be gone under this name
            with suppress(FileNotFoundError), path.open("rb") as stream:
                os.fsync(stream.fileno())
    return Timed(blocked_s, time.monotonic() - start)


def _timed(folder: Path, save: Save, step: int) -> Timed:
    """A save by all ranks, after everything before it is deleted or on disk; the slowest rank's times."""
    is_alone = not dist.is_initialized()
    if is_alone or dist.get_rank() == 0:
        shutil.rmtree(folder / "theirs", ignore_errors=True)
        os.sync()
    if not is_alone:
        dist.barrier()
    timed = save(step)
    if is_alone:
        return timed
    values = torch.tensor([timed.blocked_s, timed.safe_s], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return Timed(*values.tolist())


# --- finding the place in the data --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Turn -> the utterances of its unit; where training would read their audio."""

    plan: Plan

    def __getitem__(self, turn: Turn) -> np.ndarray:
        assert turn.unit is not None, "one process is never idle"
        return self.plan.unit(turn.epoch, turn.step, turn.unit).ids


def write_lengths(folder: Path, utterances: int) -> None:
    """A corpus of lengths alone, 1 to 20 s, as prepared by each side: our index, and a data set on disk."""
    seconds = np.random.default_rng(0).uniform(1, 20, utterances)
    lengths = (seconds * SAMPLE_RATE).astype(np.int64)
    LengthIndex.build(lengths).save(folder / "index")
    disable_progress_bars()
    Dataset.from_dict({"length": lengths}).save_to_disk(folder / "dataset")


def measure_resumes(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds until the next batch is known, by who looks for it and where."""
    ways: dict[str, Callable[[float], int]] = {
        "ours": partial(_resume_ours, folder / "all" / "index"),
        "random": partial(_resume_trainer, folder / "all" / "dataset", "random"),
        "grouped": partial(_resume_trainer, folder / "few" / "dataset", "group_by_length"),
    }
    for find in ways.values():  # warm-up: the files are in memory
        find(POSITIONS[0])
    cases = [(way, position) for way in ways for position in POSITIONS]
    runs: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for way, position in cases if number % 2 == 0 else reversed(cases):
            start = time.monotonic()
            if ways[way](position) < 1:
                raise ValueError(f"{way}: no utterance found at {position:.0%} of the epoch")
            runs[way, position].append(time.monotonic() - start)
    return {
        way: {
            "seconds": {f"{position:.0%}": spread(runs[way, position]) for position in POSITIONS},
            "of_the_start": spread(
                [late / early for early, late in zip(*(runs[way, position] for position in POSITIONS), strict=True)]
            ),
        }
        for way in ways
    }


def _resume_ours(index: Path, position: float) -> int:
    """Utterances of the next unit, from the files of a corpus on."""
    settings = PlanSettings(unit_audio_s=84.0, unit_utterances=None, units_per_step=1, order="cost", quadratic=0.0)
    plan = Plan(LengthIndex.open(index), settings, seed=0)
    turns = RankTurns(plan, rank=0, world_size=1, epoch=0, step=int(position * plan.steps_per_epoch))
    batches: Any = Units(plan)
    with open_loader(batches, turns, num_workers=0, pin_memory=False) as loader:
        found: Any = next(loader)
    return len(found)


def _resume_trainer(dataset: Path, strategy_name: str, position: float) -> int:
    """Utterances of the next batch, from the data set on disk on: what `Trainer.train` does to get there."""
    arguments = TrainingArguments(
        output_dir=str(dataset.parent / "trainer"), per_device_train_batch_size=BATCH, report_to=[], use_cpu=True,
        train_sampling_strategy=strategy_name, length_column_name="length", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model=torch.nn.Linear(1, 1),
        args=arguments,
        train_dataset=load_from_disk(str(dataset)),
        data_collator=lambda rows: {"length": torch.tensor([row["length"] for row in rows])},
    )
    loader = trainer.get_train_dataloader()
    num_done = int(position * len(loader))
    if num_done:
        loader = skip_first_batches(loader, num_done)
    return len(next(iter(loader))["length"])


# --- what is shown ------------------------------------------------------------------------------------------------


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected, and whether it was found; judged to two decimals, as it is shown."""
    found = {
        "one process, asynchronous save: blocked seconds beside torch.save's": (
            result["saves"]["1"]["ways"]["async"]["of_torch_save"],
            MAX_BLOCKED,
        ),
        "two processes, the same": (result["saves"]["2"]["ways"]["async"]["of_torch_save"], MAX_BLOCKED),
        "ours, time to resume at 90 % of the epoch beside that at 0 %": (
            result["resumes"]["ours"]["of_the_start"],
            MAX_GROWTH,
        ),
    }
    return [
        {"bar": name, "at_most": limit, "found": round(ratio["median"], 2), "met": round(ratio["median"], 2) <= limit}
        for name, (ratio, limit) in found.items()
    ]


def render(result: dict[str, Any]) -> str:
    """The tables, and the bars, as Markdown."""
    lines: list[str] = []
    for number, saves in result["saves"].items():
        rows = [
            [
                SAVERS[way],
                shown(found["blocked_s"], ".2f"),
                shown(found["of_torch_save"], ".2f") if way != "torch" else "1",
                f"{found['first_blocked_s']:.2f}",
                shown(found["safe_s"], ".2f"),
            ]
            for way, found in saves["ways"].items()
        ]
        processes = "one process" if number == "1" else f"{number} processes, DDP"
        columns = (processes, "s blocked", "of torch.save's", "s blocked, first save", "s until safe")
        lines += [*markdown(columns, rows), ""]
    early, late = (f"{position:.0%}" for position in POSITIONS)
    rows = [
        [
            RESUMERS[way],
            shown(found["seconds"][early], ".2f"),
            shown(found["seconds"][late], ".2f"),
            shown(found["of_the_start"], ".2f"),
        ]
        for way, found in result["resumes"].items()
    ]
    lines += [*markdown(("resume by", f"s at {early}", f"s at {late}", "ratio"), rows), ""]
    machine, saves = result["hardware"], result["saves"]["1"]
    lines += [
        f"{saves['parameters'] / 1e6:,.1f} M parameters, {saves['state_bytes'] / 1e9:,.2f} GB of state; "
        f"{result['utterances']:,} utterances; {machine['cpu']}, {machine['cores']} cores, load average "
        f"{machine['load_average_before'][0]:g}; medians and quartiles of {result['rounds']} saves and "
        f"{result['resume_rounds']} resumes each.",
        "",
    ]
    return "\n".join([*lines, *shown_bars(result["bars"])])


if __name__ == "__main__":
    sys.exit(run_main(main))
