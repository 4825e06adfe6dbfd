"""What the job of `wavefleet doctor` does on the node that it was given: look around, and write what it sees.

    python -m launch.site.probe FOLDER CODE WORD

FOLDER is the job's own, below the site's; CODE is the copy of this program that should be running, and WORD what
doctor wrote into the file `here`.
"""

import os
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asr_train.errors import EXIT_DONE, run_main
from asr_train.files import write_json
from launch.site import slurm
from launch.site.slurm import SlurmError
from launch.site.snapshot import check_running

HERE, SCRIPT, THERE = "here", "job.sh", "there.json"  # a word and the batch script of doctor; what the node saw


def main(argv: Sequence[str]) -> int:
    """Write what this node is like."""
    folder, code, word = Path(argv[0]), Path(argv[1]), argv[2]
    check_running(code)
    write_json(folder / THERE, look(folder, word, os.environ))
    return EXIT_DONE


def look(folder: Path, word: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `NodeFacts` that only a job on a node can tell."""
    node, job_id = environ["SLURMD_NODENAME"], environ["SLURM_JOB_ID"]
    return {
        "time": time.time(),
        "job_id": job_id,
        "node": node,
        "addresses": addresses(node),
        "address": _address(node),
        "requeue_problem": _requeue_problem(job_id),
        "sbatch_problem": _sbatch_problem(folder),
        "shared_problem": _shared_problem(folder, word),
        "python": platform.python_version(),
    }


def addresses(name: str) -> list[str]:
    """What a host's name resolves to on this machine; nothing where it does not."""
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def _address(node: str) -> str | None:
    try:
        return slurm.node_address(node)
    except SlurmError:
        return None


def _requeue_problem(job_id: str) -> str | None:
    """Why this job could not be put back into the queue from here; it is not tried, for that would end the job."""
    try:
        text = slurm.run("scontrol", "--oneliner", "show", "job", job_id)
    except SlurmError as error:
        return str(error)
    found = re.search(r"\bRequeue=(\d)", text)
    return "Slurm took --requeue away from the job (Requeue=0)" if found and found[1] == "0" else None


def _sbatch_problem(folder: Path) -> str | None:
    """Why no job could be submitted from here: this very one, say."""
    try:
        slurm.expected_start((folder / SCRIPT).read_text(encoding="utf-8"))
    except (OSError, SlurmError) as error:
        return str(error)
    return None


def _shared_problem(folder: Path, word: str) -> str | None:
    try:
        found = (folder / HERE).read_text(encoding="utf-8")
    except OSError as error:
        return f"a file written where doctor ran is not seen on the node: {error}"
    return None if found == word else f"{folder / HERE} has another content on the node than where doctor ran"


if __name__ == "__main__":
    sys.exit(run_main(main))
