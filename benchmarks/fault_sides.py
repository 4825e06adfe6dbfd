"""Two small trainings that faults are done to: ours, and one with accelerate's checkpoints as its guide has them.

Both have dropout, shuffled data, epochs of five steps, and real processes: copies of this one, which has imported
everything.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import traceback
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import soundfile
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import ProjectConfiguration, set_seed
from torch.distributed.checkpoint import FileSystemReader

from asr_train import checkpoint, checkpoints
from asr_train.checkpoint import Saver
from asr_train.errors import run_main
from asr_train.files import file_hash, hash_json, read_json, read_jsonl, write_json
from asr_train.geometry import SAMPLE_RATE
from asr_train.prepare import prepare
from asr_train.recipe import decode_recipe
from asr_train.run_dir import RunDir, read_metrics
from asr_train.train import train
from asr_train.training_log import TrainingLog

NUM_STEPS = 12
EPOCH = 5  # steps
_KEPT: list[Any] = []  # torch 2.13: DDP's destructor waits, with the GIL, for a thread of gloo that may want the GIL
_PATIENCE_S = 120  # for a training of a few seconds
_WORDS = ("red", "green", "blue", "one", "two", "three")
_MODEL = {  # 0.2 M parameters
    "feat_extract_norm": "layer", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "conv_dim": [32] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

Side: TypeAlias = "Ours | Theirs"
_DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")

Arm = Callable[[int], None]  # called in the training's process after each step, before what is saved at it


@dataclass(frozen=True, kw_only=True)
class How:
    """How a training is run.

    Attributes:
        keep: checkpoints that it keeps.
        every: steps between them.
        dropout: whether it has any.
        number: processes.
        resume: go on from the newest checkpoint; ours does in any case.
        arm: for a fault.
    """

    keep: int
    every: int = EPOCH
    dropout: bool = True
    number: int = 1
    resume: bool = False
    arm: Arm | None = None


@dataclass(frozen=True)
class Ended:
    """How processes ended, all of them together.

    Attributes:
        code: exit code of the first one that did not end well, negative for a signal; else 0.
        output: all that they printed.
    """

    code: int
    output: str


def in_processes(number: int, where: Path, function: Callable[[], int]) -> Ended:
    """Call a function in so many processes, as ranks of one group, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_be_rank, args=(rank, number, port, where, function)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(_PATIENCE_S)
        if rank.exitcode is None:
            rank.kill()
            raise TimeoutError(f"a process has not ended in {_PATIENCE_S} s; it printed to {where}")
    output = "".join((where / f"output-{rank}").read_text(errors="replace") for rank in range(number))
    return Ended(next((rank.exitcode for rank in ranks if rank.exitcode), 0), output)


def _be_rank(rank: int, number: int, port: int, where: Path, function: Callable[[], int]) -> None:
    """The life of a process; it leaves at once, without torch's clean-up of a gloo group, see `_KEPT`."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_PORT": port}
    if number > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in values.items()}
    output = os.open(where / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    code = 1
    try:
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Ours:
    """A recipe, trained by `wavefleet train`'s program; the same command resumes."""

    name = "ours"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        manifest = folder / "speech.jsonl"
        generator = np.random.default_rng(0)
        lines = []
        for number in range(20):
            samples = generator.normal(0, 3000, int(generator.uniform(1, 2) * SAMPLE_RATE)).astype(np.int16)
            soundfile.write(folder / f"{number}.wav", samples, SAMPLE_RATE)
            lines.append({"audio_filepath": f"{number}.wav", "text": " ".join(generator.choice(_WORDS, 2))})
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._data = {"train": {"kind": "jsonl", "path": str(manifest)}, "corpus_root": str(folder), "num_proc": 1}
        prepare(self._recipe(folder, How(keep=1)), progress=False)

    def _recipe(self, run: Path, how: How) -> Any:
        config = _MODEL | ({} if how.dropout else dict.fromkeys(_DROPOUTS, 0.0) | {"layerdrop": 0.0})
        return decode_recipe(
            {
                "name": "faults", "run_dir": str(run), "max_steps": NUM_STEPS, "unit_audio_s": 3, "units_per_step": 2,
                "num_workers": 0, "data": self._data, "model": {"architecture": "wav2vec2", "config": config},
                "checkpoint": {"every": str(how.every), "keep_last": how.keep, "keep_best": 0}, "log": {"every": 1},
            }
        )  # fmt: skip

    def run(self, run: Path, how: How) -> Ended:
        """Train to the end."""

        def program() -> int:
            if how.arm is not None:
                arm, end_step = how.arm, TrainingLog.end_step

                def end_and_arm(self: Any, *args: Any) -> None:
                    end_step(self, *args)
                    arm(self._state.step)

                TrainingLog.end_step = end_and_arm
            return run_main(lambda _: train(self._recipe(run, how)), [])

        run.mkdir(exist_ok=True)
        return in_processes(how.number, run, program)

    def losses(self, run: Path) -> dict[int, float]:
        """Step -> loss, of the last attempt that made it."""
        return {line["step"]: line["loss"] for line in read_metrics(RunDir(run)) if "loss" in line}

    def attempt_from(self, run: Path) -> int | None:
        """The step that the last attempt went on from; None when it made none."""
        lines = [line for line in read_jsonl(run / "metrics.jsonl") if line.get("event") in ("started", "restored")]
        return int(lines[-1]["step"]) if lines else None

    def newest(self, run: Path) -> Path:
        """The newest checkpoint."""
        return checkpoints.found(run / "checkpoints")[-1].path

    def sizes(self, run: Path) -> Mapping[str, int]:
        """After how many bytes of its largest file the newest checkpoint is in the middle of which part."""
        size = max(path.stat().st_size for path in self.newest(run).rglob("*") if path.is_file())
        return {"weights": size // 4, "optimizer": size * 3 // 4}

    def cut(self, run: Path) -> None:
        """Make of a run that is done one that its machine's end left."""
        done = RunDir(run)
        done.done.unlink()
        last = self.newest(run)
        assert checkpoints.order(last.name)[0] == NUM_STEPS, "saved at the end"
        shutil.rmtree(last)

    def file(self, run: Path, part: str) -> Path:
        """The newest checkpoint's file that a part is in."""
        names = {"generators": "generators/rank-0.json", "index": f"{checkpoints.SHARDS}/.metadata"}
        return self.newest(run) / names.get(part, f"{checkpoints.SHARDS}/__0_0.distcp")

    def middle_of(self, run: Path, part: str) -> int:
        """A byte in the middle of the largest tensor of a part, in its file."""
        shards = self.newest(run) / checkpoints.SHARDS
        places = FileSystemReader(shards).read_metadata().storage_data
        prefix = {"weights": "model.", "optimizer": "optimizer."}[part]
        largest = max((place for index, place in places.items() if index.fqn.startswith(prefix)), key=_length)
        return int(largest.offset + largest.length // 2)

    def make_fit(self, run: Path, path: Path) -> None:
        """Have the manifest say that a file is as it is: what somebody does who wants it to be loaded."""
        manifest = self.newest(run) / checkpoints.MANIFEST
        content = read_json(manifest)
        del content["manifest_hash"]
        name = str(path.relative_to(manifest.parent))
        content["files"][name] = {"size": path.stat().st_size, "hash": file_hash(path, content["hash"])}
        write_json(manifest, {**content, "manifest_hash": hash_json(content)})

    def kill_points(self) -> Mapping[str, tuple[Any, str, bool]]:
        """Moment of a save -> the function (of what, its name) at which a process is killed, and whether after it."""
        return {
            "begins": (Saver, "_write", False),
            "between": (checkpoint, "_write_text", False),
            "written": (Saver, "_verify_and_prune", False),
        }


class Theirs:
    """A loop with `Accelerator.save_state` and `load_state`, automatic naming, and `skip_first_batches`."""

    name = "accelerate"

    def __init__(self, folder: Path) -> None:
        del folder

    def run(self, run: Path, how: How) -> Ended:
        """Train to the end."""
        run.mkdir(exist_ok=True)
        return in_processes(how.number, run, lambda: _their_training(run, how))

    def losses(self, run: Path) -> dict[int, float]:
        """Step -> loss, of the last attempt that made it."""
        return {line["step"]: line["loss"] for line in read_jsonl(run / "losses.jsonl") if "loss" in line}

    def attempt_from(self, run: Path) -> int | None:
        """The step that the last attempt went on from; None when it made none."""
        lines = [line for line in read_jsonl(run / "losses.jsonl") if "from" in line]
        return int(lines[-1]["from"]) if lines else None

    def newest(self, run: Path) -> Path:
        """The checkpoint that `load_state` takes."""
        return max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))

    def sizes(self, run: Path) -> Mapping[str, int]:
        """After how many bytes of a file the newest checkpoint is in the middle of which part; they grow in turn."""
        weights, optimizer = (
            (self.newest(run) / name).stat().st_size for name in ("model.safetensors", "optimizer.bin")
        )
        return {"weights": weights // 2, "optimizer": (weights + optimizer) // 2}

    def cut(self, run: Path) -> None:
        """Nothing: this run does not save at its end, nor know whether it is done."""

    def file(self, run: Path, part: str) -> Path:
        """The newest checkpoint's file that a part is in."""
        names = {
            "weights": "model.safetensors", "optimizer": "optimizer.bin", "generators": "random_states_0.pkl",
            "index": "custom_checkpoint_0.pkl",
        }  # fmt: skip
        return self.newest(run) / names[part]

    def middle_of(self, run: Path, part: str) -> int:
        """A byte in the middle of a part's file, which one large tensor fills."""
        path = self.file(run, part)
        if part == "weights":
            return path.stat().st_size // 4  # of two tensors
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        return largest.header_offset + largest.file_size // 2

    def make_fit(self, run: Path, path: Path) -> None:
        """Nothing: no file says what another one holds."""

    def kill_points(self) -> Mapping[str, tuple[Any, str, bool]]:
        """Moment of a save -> the function (of what, its name) at which a process is killed, and whether after it."""
        from accelerate import accelerator, checkpointing  # noqa: PLC0415  `accelerator` is a usual name otherwise

        return {
            "begins": (accelerator, "save_accelerator_state", False),
            "between": (checkpointing, "save", True),
            "written": (Accelerator, "save_state", True),
        }


class _Progress:
    """The step, registered with accelerate so that it is saved and loaded with the rest."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def _their_training(run: Path, how: How) -> int:
    """The loop; the total batch is the same on any number of processes."""
    set_seed(0)
    accelerator = Accelerator(
        cpu=True,
        project_config=ProjectConfiguration(str(run), automatic_checkpoint_naming=True, total_limit=how.keep),
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 512),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.1 * how.dropout),
        torch.nn.Linear(512, 64),
    )
    data = torch.utils.data.TensorDataset(torch.randn(40, 64), torch.randn(40, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    _KEPT.append(model)
    progress = _Progress()
    accelerator.register_for_checkpointing(progress)
    if how.resume:
        accelerator.load_state()
    note(run, accelerator.is_main_process, {"from": progress.step})
    while progress.step < NUM_STEPS:
        epoch, num_done = divmod(progress.step, len(loader))
        loader.set_epoch(epoch)
        for inputs, targets in skip_first_batches(loader, num_done) if num_done else loader:
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.step += 1
            mean = float(accelerator.gather(loss.detach().reshape(1)).mean())
            note(run, accelerator.is_main_process, {"step": progress.step, "loss": mean})
            if how.arm is not None:
                how.arm(progress.step)
            if progress.step % how.every == 0:
                accelerator.save_state()
            if progress.step == NUM_STEPS:
                break
    accelerator.end_training()
    return 0


def note(run: Path, is_main: bool, line: dict[str, Any]) -> None:
    """Write down what happened."""
    if is_main:
        with (run / "losses.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def kill_at(owner: Any, name: str, *, after: bool) -> None:
    """Have this process killed when a function is called, or after it was."""
    function = getattr(owner, name)

    def killing(*args: Any, **options: Any) -> None:
        if after:
            function(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, killing)


def _length(place: Any) -> int:
    return int(place.length)
