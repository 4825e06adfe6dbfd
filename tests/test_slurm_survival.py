"""What a run survives on a real Slurm: several things happen to each, one after another, and it ends as if none had."""

import os
import signal

import pytest
from slurm_cluster import SlurmCluster
from survivor import Survivor, expected, profile, recipe, reference, survivor  # noqa: F401  fixtures

from asr_train.checkpoints import newest

# ruff: noqa: F811  their names as arguments

pytestmark = pytest.mark.slurm


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
    begun = [run.resumed_from(attempt) for attempt in (2, 3, 4)]
    assert begun == sorted(set(begun))
    assert begun[0] >= 1


def test_preempted_without_and_with_a_warning(profile, recipe, expected, tmp_path):
    """At once, by SIGTERM alone; then with a minute's grace, and SIGUSR2 first."""
    with SlurmCluster(KillWait="30") as cluster:  # long enough to save on a busy machine
        run = Survivor(cluster, profile, recipe(tmp_path / "run"))
        job = run.submit()
        for attempt in (1, 2):
            run.trains(attempt)
            urgent = cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap", "true")
            verdict = run.verdict(attempt)
            assert (verdict["kind"], verdict["num_lost_steps"], verdict["exit_code"]) == ("preempted", 0, 3)
            assert "The job was preempted. Going on from the checkpoint of step" in run.why()
            cluster.wait_for(urgent, "COMPLETED")
            cluster.reconfigure(grace_s=60, SlurmctldParameters="preempt_send_user_signal")
        run.ends_as(expected)
        assert run.status()["job_id"] == job
        assert [run.resumed_from(attempt) for attempt in (2, 3)] == [line["step"] for line in run.lines("stopped")]


def test_a_node_goes_down_in_mid_save_and_then_the_controller_when_the_job_wants_to_go_on(survivor, expected):
    run = survivor()
    job = run.submit()

    run.trains(attempt=1)
    half_written = stopped_in_mid_save(run)
    saved = newest(run.run.checkpoints).step
    lost, other = run.hosts()[1], run.hosts()[0]
    run.cluster.node_down(lost)
    verdict = run.verdict(1)
    assert (verdict["kind"], verdict["action"]) == ("node_failure", "continue")
    assert f"Lost node {lost}: Slurm: NODE_FAIL. Going on from the checkpoint of step {saved}" in verdict["message"]
    assert other not in verdict["message"]
    assert not [line["text"] for line in verdict["evidence"] if "preempted" in line["text"]]
    run.trains(attempt=2)
    assert lost not in run.hosts()
    assert not half_written.exists()
    assert run.resumed_from(2) == saved >= 1

    waited_for = run.rank(1)
    waited_for.suspend()  # nothing is trained until the controller is gone
    run.cluster.kill_controller()
    run.signal_agents(signal.SIGUSR2)
    waited_for.resume()
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
