"""Before a training starts: may it start on this node? All that is wrong at once, in sentences that say what to do.

Every node checks itself and starts `asr_train.selfcheck`, which imports torch and meets the other nodes. What it finds
it writes to `preflight-N.json` in the folder where the agents of a job meet, and there every node reads what the others
found: when one may not start, all know within a moment, and none waits for a collective that never comes.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Final

from asr_train import checkpoints
from asr_train.files import fsync_dir, read_json, write_json
from asr_train.run_dir import RunDir, library_versions
from launch import devices, snapshot
from launch.child import at_start
from launch.hardware import GpuWatch

MEET_S = 120.0  # torch may come from a slow file server on one node and not on the other
_MARGIN_S = 60.0
_GRACE_S = 15.0  # after one node lost another: for all to say so, for then it is the one that they have in common
_POLL_S = 0.2
_COMMAND_S = 120.0  # for a site's own check
_MIN_FREE_BYTES = 1 << 30  # where no checkpoint tells its size
_MIN_FREE_FILES = 1000
_PROBE_BYTES = 1 << 20
_GIB: Final = 2**30
_LAST_LINES = 3
_GPU_MEMORY_SHARE = 0.95  # what is sold as 80 GB shows some 79 GiB
_Child = Callable[[], Mapping[str, Any] | None]


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
class Place:
    """Which node of which job this is.

    Attributes:
        folder: where the agents of the job meet.
        node: its number.
        hosts: names of all, by number.
        meet: `ADDRESS:PORT` of node 0.
    """

    folder: Path
    node: int
    hosts: Sequence[str]
    meet: str

    @property
    def host(self) -> str:
        """This node's name."""
        return self.hosts[self.node]


def check(
    run: RunDir,
    place: Place,
    wanted: Wanted,
    *,
    environ: Mapping[str, str] = os.environ,
    is_asked: Callable[[], bool] = lambda: False,
    timeout_s: float = MEET_S,
) -> dict[str, Preflight]:
    """Check this node, and wait for what the others find.

    Args:
        run: what is to be trained.
        place: which node this is.
        wanted: what it should have.
        environ: of the training.
        is_asked: whether the job is asked to end meanwhile.
        timeout_s: for the nodes to meet.

    Returns:
        Host -> what was found there, of the nodes that have said anything. Training may start when `may_start` says so.
    """
    needs_torch = len(place.hosts) > 1 or wanted.num_gpus > 0
    child = _selfcheck(place, wanted.num_gpus, environ, timeout_s) if needs_torch else nullcontext(lambda: None)
    with child as said:
        mine = check_node(run, place.host, wanted, environ)
        mine = replace(mine, is_final=not (needs_torch and mine.is_well))
        _write(place, mine)
        until = time.monotonic() + timeout_s + _MARGIN_S
        while True:
            if not mine.is_final and (result := said()) is not None:
                mine = _with_result(mine, result)
                _write(place, mine)
            found = _read_all(place)
            if any(node.unreached or node.network for node in found.values()):
                until = min(until, time.monotonic() + _GRACE_S)
            is_time_up = time.monotonic() > until
            if is_time_up and not mine.is_final:
                mute = [host for host in place.hosts if host not in found or not found[host].is_final]
                mine = replace(mine, network=f"no word from {', '.join(mute)} in the check of the nodes", is_final=True)
                _write(place, mine)
                found[place.host] = mine
            if is_time_up or is_asked() or _is_over(found, place.hosts):
                return judged(found, place.hosts)
            time.sleep(_POLL_S)


def may_start(found: Mapping[str, Preflight], hosts: Sequence[str]) -> bool:
    """Whether all nodes are there and well."""
    return all(host in found and found[host].is_final and found[host].is_well for host in hosts)


def judged(found: Mapping[str, Preflight], hosts: Sequence[str]) -> dict[str, Preflight]:
    """What every node found, held against the others: who differs from them, and who is to blame for a lost connection.

    A node that does not reach node 0 has a problem; where none of several does, node 0 has.
    """
    differing = differences({host: node.facts for host, node in found.items()}) if len(found) == len(hosts) else {}
    result = {host: _joined(node, differing.get(host)) for host, node in found.items()}
    lost = [host for host, node in found.items() if node.unreached]
    others = hosts[1:]
    if len(others) > 1 and lost == list(others) and hosts[0] in found:
        what = f"none of {', '.join(others)} reached it: {found[others[0]].unreached}"
        result[hosts[0]] = _joined(result[hosts[0]], what)
    else:
        result |= {host: _joined(result[host], found[host].unreached) for host in lost}
    return {host: replace(node, unreached=None) for host, node in result.items()}


def _is_over(found: Mapping[str, Preflight], hosts: Sequence[str]) -> bool:
    """Whether all nodes have said their last word, or one need not wait for more: it, or another, cannot train."""
    is_complete = len(found) == len(hosts) and all(node.is_final for node in found.values())
    return is_complete or any(node.problem or node.hardware for node in found.values())


def differences(facts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Host -> in what it differs from most of the nodes; from the first of them where there are as many of each."""
    problems: dict[str, list[str]] = {}
    names = dict.fromkeys(name for values in facts.values() for name in values)
    for name in names:
        values = {host: found.get(name, "missing") for host, found in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # the first of equals
        others = ", ".join(host for host, value in values.items() if value == usual)
        for host, value in values.items():
            if value != usual:
                problems.setdefault(host, []).append(f"{name} is {value}, and {usual} on {others}")
    return {host: f"{'; '.join(texts)}: all nodes need the same" for host, texts in problems.items()}


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
        return f"`{line}` ended with {code}: {_last_lines(output) or 'it printed nothing'}"


def _facts() -> dict[str, str]:
    """What has to be the same on all nodes."""
    return {"Python": platform.python_version(), **library_versions(), "the code": snapshot.running_hash()}


def _joined(node: Preflight, problem: str | None) -> Preflight:
    return replace(node, problem="; ".join(text for text in (node.problem, problem) if text) or None)


def _write(place: Place, mine: Preflight) -> None:
    write_json(_file(place, place.node), asdict(mine))


def _read_all(place: Place) -> dict[str, Preflight]:
    """What the nodes have said so far; they may run other code, which is among what is looked for."""
    known = {entry.name for entry in fields(Preflight)}
    found = {}
    for number, host in enumerate(place.hosts):
        with suppress(OSError):  # not there yet
            content = read_json(_file(place, number))
            found[host] = Preflight(**{name: value for name, value in content.items() if name in known})
    return found


def _file(place: Place, number: int) -> Path:
    return place.folder / f"preflight-{number}.json"


@contextmanager
def _selfcheck(place: Place, num_gpus: int, environ: Mapping[str, str], timeout_s: float) -> Iterator[_Child]:
    """`asr_train.selfcheck` as a child, which ends with us; gives what it found, once it has ended."""
    command = [sys.executable, "-m", "asr_train.selfcheck", "--gpus", str(num_gpus), "--timeout", f"{timeout_s:g}"]
    if len(place.hosts) > 1:
        command += ["--meet", place.meet, "--node", str(place.node), "--hosts", ",".join(place.hosts)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**environ, "TORCH_CPP_LOG_LEVEL": "FATAL"},  # it says the same thing in thirty lines
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=at_start(shielded=True),  # noqa: PLW1509 - this program has one thread
        )
        try:
            yield lambda: None if process.poll() is None else _said(process.returncode, output)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _said(code: int, output: IO[bytes]) -> Mapping[str, Any]:
    """The last line of a selfcheck that has ended."""
    with suppress(ValueError):
        found = json.loads(_last_lines(output, most=1))
        if isinstance(found, dict):
            return found
    return {"problems": [f"its check in torch ended with {code}: {_last_lines(output) or 'it printed nothing'}"]}


def _with_result(mine: Preflight, said: Mapping[str, Any]) -> Preflight:
    """What this node found, with what torch found."""
    missing = said.get("missing") or ()
    network = said.get("network")
    if missing:
        network = f"no word from {', '.join(missing)} before the first all-reduce"
    problem = "; ".join(said.get("problems") or ()) or None
    return replace(mine, problem=problem, unreached=said.get("unreached"), network=network, is_final=True)


def _last_lines(stream: IO[bytes], most: int = _LAST_LINES) -> str:
    stream.seek(0)
    lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-most:] if line.strip())
