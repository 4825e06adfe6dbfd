"""What one node finds by itself before a training: GPUs, room, a folder that can be written, what a site looks for.

All of it at once, in sentences that say what to do; without torch. `preflight.py` does it on all nodes of a job.
"""

import os
import platform
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Final

from asr_train import checkpoints
from asr_train.files import fsync_dir
from asr_train.run_dir import RunDir, library_versions
from launch.node import devices
from launch.node.hardware import GpuWatch
from launch.site import snapshot

_COMMAND_S = 120.0  # for a site's own check
_MIN_FREE_BYTES = 1 << 30  # where no checkpoint tells its size
_MIN_FREE_FILES = 1000
_PROBE_BYTES = 1 << 20
_GIB: Final = 2**30
_LAST_LINES = 3
_GPU_MEMORY_SHARE = 0.95  # what is sold as 80 GB shows some 79 GiB


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a node should have.

    Attributes:
        num_gpus: GPUs.
        gpu_memory_bytes: of each, at least; as its name says, of which the driver keeps a little.
        commands: a site's own checks, shell lines that end with 0 where all is well.
    """

    num_gpus: int = 0
    gpu_memory_bytes: int = 0
    commands: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a node found.

    Attributes:
        problem: why training may not start here, all of it; None when nothing is wrong with this node.
        hardware: what its GPUs say of themselves.
        unreached: how it failed to reach node 0.
        network: what else was wrong between the nodes; None also where another node is to blame.
        facts: what has to be the same on all nodes, and what it has.
        is_final: it will not change any more.
    """

    problem: str | None = None
    hardware: str | None = None
    unreached: str | None = None
    network: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    is_final: bool = False

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.problem or self.hardware or self.unreached or self.network)


def check_node(run: RunDir, host: str, wanted: Wanted, environ: Mapping[str, str]) -> Preflight:
    """What one node finds by itself, without torch."""
    uuids = devices.visible_gpus(environ) if wanted.num_gpus else []
    with GpuWatch(uuids) as gpus:
        hardware = "; ".join(gpus.broken) or None
        memory = gpus.memory_bytes()
    problems = [*_gpu_problems(wanted, uuids, memory, environ), *_disk_problems(run), *_write_problems(run, host)]
    for number, line in enumerate(wanted.commands):
        problems += [f"preflight.{number}: {text}" for text in [_command_problem(line, environ)] if text]
    return Preflight(problem="; ".join(problems) or None, hardware=hardware, facts=_facts())


def _gpu_problems(
    wanted: Wanted, uuids: Sequence[str], memory: Mapping[str, int], environ: Mapping[str, str]
) -> Iterator[str]:
    if len(uuids) < wanted.num_gpus:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        yield f"the driver shows {len(uuids)} of {wanted.num_gpus} GPUs{hint}: `nvidia-smi` there says more"
    for name, num_bytes in memory.items():
        if num_bytes < wanted.gpu_memory_bytes * _GPU_MEMORY_SHARE:
            yield f"{name} has {num_bytes / _GIB:.1f} GiB, and gpu_memory is {wanted.gpu_memory_bytes / _GIB:.0f} GiB"


def _disk_problems(run: RunDir) -> Iterator[str]:
    """Room for two more checkpoints: the next is written before an old one goes. A quota may say less."""
    former = checkpoints.found(run.checkpoints)
    size = max((found.size_bytes for found in former), default=0)
    needed = 2 * size or _MIN_FREE_BYTES
    try:
        disk = os.statvfs(run.path)
    except OSError as error:
        yield f"{run.path} cannot be looked at: {error.strerror or error}"
        return
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        what = "two checkpoints take" if size else "checkpoints may take"
        yield f"{free / _GIB:.2f} GiB are free at {run.path}, and {what} {needed / _GIB:.2f}: make room"
    if disk.f_files and disk.f_favail < _MIN_FREE_FILES:  # some file systems do not count them
        yield f"{disk.f_favail} more files can be made at {run.path}: make room by deleting files"


def _write_problems(run: RunDir, host: str) -> Iterator[str]:
    """Write a file as a checkpoint is written: all nodes write to it."""
    path = run.checkpoints / f".preflight-{host}-{os.getpid()}"
    try:
        run.checkpoints.mkdir(exist_ok=True)
        with path.open("xb") as stream:
            stream.write(bytes(_PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        fsync_dir(run.checkpoints)
    except OSError as error:
        yield f"{run.checkpoints} cannot be written: {error.strerror or error}"
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _command_problem(line: str, environ: Mapping[str, str]) -> str | None:
    """Run a site's own check; one that hangs, on a dead mount say, is left to itself."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["bash", "-c", line], env=dict(environ), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(_COMMAND_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return f"`{line}` did not end within {_COMMAND_S:.0f} s"
        if code == 0:
            return None
        return f"{last_lines(output) or 'it printed nothing'} (`{line}` ended with {code})"


def _facts() -> dict[str, str]:
    """What has to be the same on all nodes."""
    return {"Python": platform.python_version(), **library_versions(), "the code": snapshot.running_hash()}


def last_lines(stream: IO[bytes], most: int = _LAST_LINES) -> str:
    """The end of a program's output, on one line."""
    stream.seek(0)
    lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-most:] if line.strip())
