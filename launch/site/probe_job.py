"""A short real job for `wavefleet doctor`: one task on one node, started as a node agent is, that looks around."""

import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from asr_train.errors import RecipeError, say
from asr_train.files import read_json
from launch.site import probe, slurm, snapshot
from launch.site.cluster import site_folder
from launch.site.cluster_config import Cluster
from launch.site.findings import NodeFacts
from launch.site.sbatch import python_command, sbatch_text, submitit_parameters
from launch.site.slurm import JobState, SlurmError

_TIME_MIN = 5
_POLL_S, _MAX_POLL_S = 1.0, 10.0
_SAY_S = 30.0
SEEN_S = 65.0  # NFS may show what another machine wrote after its acdirmax, 60 s
LOG_S = 5.0  # the same, once something that the node wrote is seen
_TAIL_LINES = 15
_OF_ITSELF = ("COMPLETED", "FAILED", "OUT_OF_MEMORY")  # not cancelled, preempted or lost with its node


class Looked(NamedTuple):
    """What the job found; or why it found nothing, and whether no run could work for the same reason."""

    node: NodeFacts | None
    problem: str | None = None
    cannot_run: bool = False


def look(cluster: Cluster, name: str, timeout_s: float) -> Looked:
    """Have a job look around on a node; it is cancelled when it has not done so in time, or we are interrupted.

    Raises:
        RecipeError: the site's folder cannot be written.
    """
    word = secrets.token_hex(8)
    with _folder(cluster, name, word) as folder:
        code = snapshot.take(folder / "code")
        (folder / probe.HERE).write_text(word, encoding="utf-8")
        try:
            job_id = _submit(cluster, folder, code, word)
        except SlurmError as error:
            return Looked(None, f"Slurm takes no job: {error}", cannot_run=True)
        say(f"job {job_id} looks around on a node; waiting up to {timeout_s:.0f} s for it")
        looked = None
        try:
            looked = _wait(job_id, folder, timeout_s)
        finally:
            if looked is None or looked.node is None:
                with suppress(SlurmError):  # over already
                    slurm.cancel(job_id)
        return looked


def script(cluster: Cluster, folder: Path, code: Path, word: str, *, num_gpus: int) -> str:
    """The batch text: the profile's, with one node, one CPU, and a few minutes."""
    small = replace(
        cluster,
        nodes=1,
        gpus_per_node=num_gpus,
        gpu_type=cluster.gpu_type if num_gpus else None,
        cpus_per_node=1,
        memory=None if cluster.memory is None else "1G",
        time=_TIME_MIN,
        signal_lead_s=30,
        sbatch={key: value for key, value in cluster.sbatch.items() if key != "exclusive"},
    )
    parameters = submitit_parameters(small, job_name="wavefleet-doctor", nodes=1, hold=False)
    parameters["additional_parameters"] |= {"chdir": str(code)}
    parameters["setup"] = [*parameters["setup"], f"export PYTHONPATH={shlex.quote(str(code))}"]
    arguments = shlex.join(["-m", "launch.site.probe", str(folder), str(code), word])
    return sbatch_text(parameters, folder, f"{python_command(small)} {arguments}")


@contextmanager
def _folder(cluster: Cluster, name: str, word: str) -> Iterator[Path]:
    """A folder of the job's own on the shared file system."""
    folder = (site_folder(cluster, name) / f"doctor-{word}").absolute()
    try:
        folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise RecipeError(f"shared: {folder.parent} cannot be written: {error}; name another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _submit(cluster: Cluster, folder: Path, code: Path, word: str) -> str:
    """The job's id. It asks for no GPU, and for one where a partition takes no job without.

    Raises:
        SlurmError: Slurm takes neither.
    """
    for num_gpus in range(min(cluster.gpus_per_node, 1) + 1):
        text = script(cluster, folder, code, word, num_gpus=num_gpus)
        (folder / probe.SCRIPT).write_text(text, encoding="utf-8")
        try:
            return slurm.sbatch(text)
        except SlurmError as error:
            refused = error
    raise refused


def _wait(job_id: str, folder: Path, timeout_s: float) -> Looked:
    """Wait until the job's findings are seen, or it is known why they never will be."""
    begun = time.monotonic()
    said, next_say = "", 0.0
    while True:
        state = slurm.job_state(job_id)
        if (folder / probe.THERE).exists():
            return Looked(_facts(folder, 0.0))
        if not state.is_live:
            return _after(job_id, state, folder)
        text = f"job {job_id} is {_described(state)}"
        now = time.monotonic()
        if now > begun + timeout_s:
            return Looked(None, f"{text} after {timeout_s:.0f} s, and was cancelled; try later, or with --timeout")
        if text != said or now >= next_say:
            say(text)
            said, next_say = text, now + _SAY_S
        time.sleep(min(max(_POLL_S, (now - begun) / 10), _MAX_POLL_S))  # the longer it takes, the less we ask


def _after(job_id: str, state: JobState, folder: Path) -> Looked:
    """The job is over: wait for what it wrote to be seen here."""
    ended = time.monotonic()
    while True:
        waited_s = time.monotonic() - ended
        if probe.THERE in os.listdir(folder):
            return Looked(_facts(folder, waited_s))
        log = _log(folder)
        if waited_s > (SEEN_S if log is None else LOG_S):
            break
        time.sleep(_POLL_S)
    if state.state not in _OF_ITSELF:
        last = f"; its last lines:\n{log}" if log else ""
        return Looked(None, f"job {job_id} ended ({_described(state)}) before it looked around; try again{last}")
    if log is not None:
        said = f"its last lines:\n{log}" if log else "it printed nothing: a line of `setup` failed, or a module"
        problem = f"job {job_id} ended ({_described(state)}) before it looked around; {said}"
        return Looked(None, problem, cannot_run=True)
    problem = (
        f"job {job_id} ended ({_described(state)}), and nothing that it wrote in {folder.parent} was seen here within "
        f"{SEEN_S:.0f} s: nodes do not share that folder; name one that they do in the profile's `shared`"
    )
    return Looked(None, problem, cannot_run=True)


def _facts(folder: Path, seen_after_s: float) -> NodeFacts:
    found = read_json(folder / probe.THERE)
    found["addresses"] = tuple(found["addresses"])
    return NodeFacts(**found, here=tuple(probe.addresses(found["node"])), seen_after_s=seen_after_s)


def _log(folder: Path) -> str | None:
    """The last lines that the job has printed; None where not even a file for them is seen."""
    paths = sorted(folder.glob("*_log.*"))
    if not paths:
        return None
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return "\n".join(f"  {line}" for line in text.splitlines()[-_TAIL_LINES:])


def _described(state: JobState) -> str:
    reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
    start = f", expected to start at {state.start}" if state.state == "PENDING" and state.start else ""
    return f"{state.state}{reason}{start}"
