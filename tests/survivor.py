"""A training on a real Slurm that things happen to: its processes, its attempts, and whether it ended all the same."""

import json
import os
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from ranks import run_ranks
from test_runs import assert_close, losses, trained_ids

from asr_train.files import read_json, read_jsonl
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir
from asr_train.train import train
from launch.jobs.submit import submissions

WAIT_S = 300  # for what takes a minute at most on a machine that has nothing else to do


class Survivor:
    """One run; `cluster` is a `SlurmCluster`, `profile` a file; both None for a run of this machine."""

    def __init__(self, cluster, profile, recipe):
        self.cluster, self.profile, self.recipe = cluster, profile, recipe
        self.path = Path(recipe.run_dir)
        self.run = RunDir(self.path)
        self.recipe_file = self.path.with_suffix(".yaml")
        self.path.parent.mkdir(exist_ok=True)
        self.recipe_file.write_text(dump_recipe(recipe))

    # What a user does

    @property
    def submission(self):
        """The words of the command that submits it."""
        return ("submit", self.recipe_file, "--cluster", self.profile)

    def wavefleet(self, *arguments, code=0, environ=None):
        """What a command prints, and says."""
        done = self.cluster.wavefleet(*arguments, code=code, environ=environ)
        return done.stdout if "--json" in arguments else done.stdout + done.stderr

    def submit(self, *arguments):
        self.wavefleet(*self.submission, *arguments)
        return submissions(self.run)[-1].job_id

    def status(self):
        return json.loads(self.wavefleet("status", self.path, "--json"))

    def why(self):
        return self.wavefleet("why", self.path)

    def reconcile(self, *options):
        """What is to be done about each run of the folder."""
        return [
            found["action"] for found in json.loads(self.wavefleet("reconcile", self.path.parent, "--json", *options))
        ]

    # What happens

    def until(self, condition, timeout_s=WAIT_S, poll_s=0.2):
        """What a condition gives, once it is true."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > end:
                logs = "".join(
                    f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.path.glob("slurm/*_log.*")
                )
                queue = self.cluster and self.cluster.run("squeue")
                raise AssertionError(f"{self.path}\n{self.verdicts()}\n{queue}\n{logs}")
            time.sleep(poll_s)
        return found

    def soon(self, condition):
        """Whether a condition becomes true within ten seconds."""
        end = time.monotonic() + 10
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)
        return condition()

    def verdicts(self):
        return [line for line in read_jsonl(self.path / "verdicts.jsonl") if "kind" in line]

    def verdict(self, number):
        """The verdict on a start, from 1, once it is there; they are as many."""
        self.until(lambda: len(self.verdicts()) >= number)
        assert len(self.verdicts()) == number
        return self.verdicts()[-1]

    def lines(self, event=None):
        """Lines of metrics.jsonl: of steps, or of an event."""
        of_steps = event is None
        return [
            line
            for line in read_jsonl(self.run.metrics)
            if ("loss" in line if of_steps else line.get("event") == event)
        ]

    def trains(self, attempt, num_steps=2):
        """Wait until an attempt has made some steps."""
        self.until(lambda: sum(line["attempt"] == attempt for line in self.lines()) >= num_steps)

    def resumed_from(self, attempt):
        """The step that an attempt went on from."""
        return next(line["step"] for line in self.lines("restored") if line["attempt"] == attempt)

    def agents(self):
        """Node -> pid of its agent, of the newest start."""
        newest = max(self.path.glob("agents/*/start.json"), key=lambda path: path.stat().st_mtime).parent
        return {int(path.stem[5:]): read_json(path)["pid"] for path in newest.glob("node-*.json")}

    def hosts(self):
        newest = max(self.path.glob("agents/*/start.json"), key=lambda path: path.stat().st_mtime)
        return read_json(newest)["hosts"]

    def rank(self, number):
        """A rank's process."""
        return rank_below(self.agents().values(), number)

    @contextmanager
    def paused(self):
        """Nothing is trained meanwhile: as many ranks as there are agents stand still.

        Slurm sends SIGCONT before its warning, so that they may go on, save and be gone before this is over.
        """
        ranks = [self.rank(number) for number in self.agents()]
        for process in ranks:
            process.suspend()
        yield
        for process in ranks:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def is_asked_to_stop(self):
        """Whether its ranks will find the request, once they look."""
        return (self.run.control / "stop").exists()

    def signal_agents(self, number):
        for pid in self.agents().values():
            os.kill(pid, number)

    def kill_all(self, job):
        """SIGKILL for every process of a job, its batch script first, on all nodes."""
        found = []
        for pid in self.cluster.processes():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.environ().get("SLURM_JOB_ID") == job:
                    found.append(process)
        for process in sorted(found, key=psutil.Process.create_time):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    # How it ended

    def ends_as(self, expected, relative=1e-5, max_steps=None):
        """Wait for its end; every step has the loss and the utterances that it has in a run without interruptions."""
        self.until(lambda: self.run.done.exists() and self.verdicts() and self.verdicts()[-1]["kind"] == "done")
        made, whole = losses(self.run), losses(expected)
        assert list(made) == list(range(1, (max_steps or self.recipe.max_steps) + 1))
        numbers = [step for step in made if whole[step] is not None]  # as in steps that were skipped
        assert numbers == [step for step in made if made[step] is not None]
        assert_close({step: made[step] for step in numbers}, {step: whole[step] for step in numbers}, relative)
        epoch_of = {line["step"]: line["epoch"] for line in self.lines()}
        ids = trained_ids(self.run)
        assert ids == {step: found for step, found in trained_ids(expected).items() if step in made}
        seen = Counter((epoch_of[step], name) for step, names in ids.items() for name in names)
        assert set(seen.values()) == {1}


def rank_below(pids, number):
    """The process of a rank that one of these has started."""
    for pid in pids:
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.environ().get("RANK") == str(number):
                    return process
    raise AssertionError(f"no rank {number}")


# Fixtures, for those who import them

STEPS = 100


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tiny_corpus):
    """A recipe that saves after every step, so that steps are slow enough for things to happen between them."""

    def make(folder, **changes):
        values = {
            "run_dir": str(folder),
            "max_steps": STEPS,
            "unit_audio_s": 3,
            "units_per_step": 2,
            "num_workers": 0,
            "optim.schedule": "constant",
            "checkpoint": {"every": "1", "asynchronous": False},
            "log": {"every": 1, "trained_ids": True, "trackers": []},
        }
        return tiny_recipe(**{**values, **changes})

    return make


_REFERENCES = {}  # of all modules that import the fixtures


@pytest.fixture(scope="module")
def reference(recipe, tmp_path_factory):
    """A function: number of steps -> a run of so many that nothing happened to."""

    def make(max_steps=STEPS, **changes):
        key = repr((max_steps, changes))
        if key not in _REFERENCES:
            _REFERENCES[key] = made(max_steps, changes)
        return _REFERENCES[key]

    def made(max_steps, changes):
        folder = tmp_path_factory.mktemp("reference") / "run"
        whole = recipe(folder, **{"max_steps": max_steps, "checkpoint": {"every": None}, **changes})
        assert run_ranks(2, train, whole, timeout_s=600) == [0, 0]
        return RunDir(folder)

    return make


@pytest.fixture(scope="module")
def expected(reference):
    return reference(STEPS)


@pytest.fixture
def profile(tmp_path):
    """Two nodes, whole ones so that they can be preempted; nodes that a test has excluded are another's again."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "nodes: 2\ngpus_per_node: 0\ncpus_per_node: 1\ntime: 60\nsignal_lead_s: 90\nprocesses_per_node: 1\n"
        f"sbatch: {{exclusive: true}}\nshared: {tmp_path / 'learned'}\n"
        "environment: {OMP_NUM_THREADS: 1, TOKENIZERS_PARALLELISM: 'false'}\n"
    )
    return path


@pytest.fixture
def survivor(slurm, profile, recipe, tmp_path):
    """A function: changes of the recipe -> a run that is not submitted yet."""
    return lambda **changes: Survivor(slurm, profile, recipe(tmp_path / "run", **changes))
