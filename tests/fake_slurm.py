"""Slurm's commands as one small program, for tests of what is asked of it: jobs are kept in a file, nothing runs."""

import json
import os
import sys
from pathlib import Path

PROGRAM = Path(__file__)
NAMES = ("sbatch", "srun", "sinfo", "squeue", "scontrol", "scancel", "sacct")


class FakeSlurm:
    """What was asked, and what is answered.

    Jobs are PENDING when submitted; `end` takes one out of the queue. `refuse` names words of a batch script that
    sbatch refuses; `max_array_size` is the cluster's.
    """

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name in NAMES:
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {PROGRAM} {folder} {name} "$@"\n')
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        self.write(jobs={}, refuse=None, max_array_size=1001, is_down=False)

    def read(self):
        return json.loads((self.folder / "state.json").read_text())

    def write(self, **changes):
        path = self.folder / "state.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **changes}))

    @property
    def jobs(self):
        """Id -> state, held, comment, text of the batch script."""
        return self.read()["jobs"]

    def options(self, job):
        """What a job's script asks sbatch for: option -> value."""
        lines = [line.removeprefix("#SBATCH --") for line in self.jobs[job]["text"].splitlines() if "#SBATCH" in line]
        return {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}

    def end(self, *jobs, state="COMPLETED"):
        found = self.jobs
        for job in jobs or list(found):
            found[job]["state"] = state
        self.write(jobs=found)

    def calls(self, name):
        """Arguments of every call of a command."""
        path = self.folder / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(folder, name, *arguments):
    path = Path(folder, "state.json")
    state = json.loads(path.read_text())
    with Path(folder, f"{name}.calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if state["is_down"]:
        sys.exit(f"{name}: error: Unable to contact slurm controller (connect failure)")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in arguments if word.startswith("--"))
    globals()[f"_{name}"](state, options, [word for word in arguments if not word.startswith("--")])
    path.write_text(json.dumps(state))


def _sbatch(state, options, words):
    text = Path(words[0]).read_text()
    if state["refuse"] is not None and state["refuse"] in text:
        sys.exit("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy")
    job = str(100 + len(state["jobs"]))
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH --comment=")]
    comment = asked[0].partition("=")[2].strip("'") if asked else ""
    state["jobs"][job] = {"state": "PENDING", "held": "--hold" in text, "comment": comment, "text": text}
    print(f"Submitted batch job {job}")


def _squeue(state, options, words):
    wanted = options.get("jobs", "").split(",") if "jobs" in options else list(state["jobs"])
    if "jobs" in options and not any(job in state["jobs"] for job in wanted):
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    for job in wanted:
        entry = state["jobs"].get(job)
        if entry is None or ("states" not in options and entry["state"] not in ("PENDING", "RUNNING", "COMPLETING")):
            continue
        reason = "JobHeldUser" if entry["held"] else "None"
        values = {
            "%F": job,
            "%i": job,
            "%T": entry["state"],
            "%r": reason,
            "%S": "N/A",
            "%N": "",
            "%k": entry["comment"],
        }
        print("|".join(values[word] for word in options["format"].split("|")))


def _scontrol(state, options, words):
    match words:
        case ["release", job]:
            state["jobs"][job]["held"] = False
        case ["show", "config"]:
            print(f"MaxArraySize            = {state['max_array_size']}")
        case ["show", "job", job]:
            print(f"JobId={job} Restarts=0")


def _scancel(state, options, words):
    for job in words:
        state["jobs"][job]["state"] = "CANCELLED"


def _sinfo(state, options, words):
    nodes = [{"%N": name, "%T": "idle", "%E": "none", "%P": "batch*", "%f": "(null)"} for name in ("n1", "n2")]
    for node in nodes:
        print("|".join(node[word] for word in options["format"].split("|")))


def _srun(state, options, words):
    raise AssertionError("nothing runs here")


def _sacct(state, options, words):
    sys.exit("Slurm accounting storage is disabled")


if __name__ == "__main__":
    main(*sys.argv[1:])
