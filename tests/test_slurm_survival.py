"""What a run survives on a real Slurm: several things happen to each, one after another, and it ends as if none had."""

import os
import signal

import pytest
from ranks import run_ranks
from slurm_cluster import SlurmCluster
from survivor import Survivor

from asr_train.run_dir import RunDir
from asr_train.train import train

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
            "log": {"every": 1, "trained_ids": True},
        }
        return tiny_recipe(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def reference(recipe, tmp_path_factory):
    """A function: number of steps -> a run of so many that nothing happened to."""

    def make(max_steps, **changes):
        folder = tmp_path_factory.mktemp("reference") / "run"
        whole = recipe(folder, max_steps=max_steps, **{"checkpoint": {"every": None}, **changes})
        assert run_ranks(2, train, whole, timeout_s=600) == [0, 0]
        return RunDir(folder)

    return make


@pytest.fixture(scope="module")
def expected(reference):
    return reference(STEPS)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    (folder / "small.yaml").write_text(
        "nodes: 2\ngpus_per_node: 0\ncpus_per_node: 1\ntime: 60\nsignal_lead_s: 60\nprocesses_per_node: 1\n"
        f"sbatch: {{exclusive: true}}\nshared: {folder / 'learned'}\n"
        "environment: {OMP_NUM_THREADS: 1, TOKENIZERS_PARALLELISM: 'false'}\n"
    )
    return folder / "small.yaml"


@pytest.fixture
def survivor(slurm, profile, recipe, tmp_path):
    """A function: changes of the recipe -> a run that is not submitted yet."""
    return lambda **changes: Survivor(slurm, profile, recipe(tmp_path / "run", **changes))


def test_a_worker_and_then_each_agent_are_killed(survivor, expected):
    run = survivor()
    job = run.submit()

    run.trains(attempt=1)
    run.rank(1).kill()
    verdict = run.verdict(1)
    assert (verdict["kind"], verdict["action"], verdict["rank"]) == ("failed", "retry", 1)
    assert f"rank 1 on {run.hosts()[1]}: killed by SIGKILL" in run.why()

    for attempt, node in ((2, 1), (3, 0)):
        run.trains(attempt)
        host = run.hosts()[node]
        os.kill(run.agents()[node], signal.SIGKILL)
        verdict = run.verdict(attempt)
        assert (verdict["kind"], verdict["action"]) == ("node_failure", "continue")
        assert f"Lost node {host}: its agent said nothing at its end" in verdict["message"]

    run.ends_as(expected)
    assert run.status()["job_id"] == job
    assert all(run.resumed_from(attempt) >= 2 for attempt in (2, 3, 4))


def test_preempted_without_and_with_a_warning(profile, recipe, expected, tmp_path):
    """At once, by SIGTERM alone; then with a minute's grace, and SIGUSR2 first."""
    with SlurmCluster() as cluster:
        run = Survivor(cluster, profile, recipe(tmp_path / "run"))
        job = run.submit()
        for attempt in (1, 2):
            run.trains(attempt)
            urgent = cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap", "true")
            verdict = run.verdict(attempt)
            assert (verdict["kind"], verdict["num_lost_steps"], verdict["exit_code"]) == ("preempted", 0, 3)
            assert "The job was preempted. Going on from the checkpoint of step" in run.why()
            cluster.wait_for(urgent, "COMPLETED", timeout=120)
            cluster.reconfigure(grace_s=60, SlurmctldParameters="preempt_send_user_signal")
        run.ends_as(expected)
        assert run.status()["job_id"] == job
        assert [run.resumed_from(attempt) for attempt in (2, 3)] == [line["step"] for line in run.lines("stopped")]


def test_a_node_goes_down_in_mid_save_and_then_the_controller_when_the_job_wants_to_go_on(survivor, expected):
    run = survivor()
    job = run.submit()

    run.trains(attempt=1)
    half_written = stopped_in_mid_save(run)
    lost = run.hosts()[1]
    run.cluster.node_down(lost)
    verdict = run.verdict(1)
    assert (verdict["kind"], verdict["action"]) == ("node_failure", "continue")
    assert lost in verdict["message"]
    run.trains(attempt=2)
    assert lost not in run.hosts()
    assert not half_written.exists()
    saved = int(max(path.name for path in run.run.checkpoints.glob("step-*"))[5:])
    assert 2 <= run.resumed_from(2) <= saved

    other = run.rank(1)
    other.suspend()  # nothing is trained until the controller is gone
    run.cluster.kill_controller()
    run.signal_agents(signal.SIGUSR2)
    other.resume()
    assert run.verdict(2)["kind"] == "time_limit"
    run.until(lambda: "trying again" in agent_output(run, job))
    run.cluster.start_controller()
    run.ends_as(expected)
    assert run.status()["job_id"] == job
    assert run.resumed_from(3) == run.lines("stopped")[0]["step"]


def stopped_in_mid_save(run):
    """Stop rank 1 while a checkpoint is being written, which cannot be committed now; its folder."""
    process = run.rank(1)
    while True:
        folder = run.until(lambda: next(run.run.checkpoints.glob(".staging-*"), None))
        process.suspend()
        if not run.soon(lambda there=folder: not there.exists()):
            return folder
        process.resume()  # it had done its part already


def agent_output(run, job):
    return (run.path / "slurm" / f"{job}_0_log.err").read_text()
