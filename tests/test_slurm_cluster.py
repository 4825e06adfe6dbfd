"""The cluster that other tests rely on: a real Slurm that times out, preempts, fails, and leaves nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import CommandError, SlurmCluster

pytestmark = pytest.mark.slurm

# One task: it tells of signals, and so does a child of it in a session of its own. TERM ends the task.
# It speaks without a child: a signal to the whole tree would kill that, and with it half of the line.
TASK = """#!/bin/bash
say() { printf '%(%s)T %s %s\\n' -1 "$SLURMD_NODENAME" "$*"; }
trap "say $1 USR2" USR2
trap "say $1 TERM; exit 0" TERM
if [ "$1" = agent ]; then
  setsid "$0" worker &
  say begin ${SLURM_RESTART_COUNT:-0} gpus $CUDA_VISIBLE_DEVICES
else
  say $1 is ready
fi
while :; do sleep 0.1; done
"""


def write_task(folder):
    path = folder / "task.sh"
    path.write_text(TASK, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


def wrap(task):
    return ("--wrap", f"exec srun --quiet {task} agent 2>/dev/null")


def processes_with(folder):
    """Living processes that name a folder in their arguments or their environment."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path("/proc", entry, "cmdline").read_bytes() + Path("/proc", entry, "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text:
            found.append((entry, text[:200]))
    return found


@pytest.fixture(scope="module")
def limited(slurm_session, task):
    """A job whose time limit comes while other tests run: the check may take 30 s."""
    job = slurm_session.submit("--nodelist=n4", "--signal=USR2@5", *wrap(task))
    slurm_session.wait_for_output(job, "begin")
    slurm_session.end_soon(job, 6)
    return job


def test_a_job_of_two_nodes_writes_from_both(slurm_session, limited):
    job = slurm_session.submit(
        "--nodes=2",
        "--gres=gpu:2",
        "--wrap",
        "srun bash -c 'echo $SLURM_NODEID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'",
    )
    fields = slurm_session.wait_for(job, "COMPLETED")
    nodes = re.fullmatch(r"n\[(\d)-(\d)\]", fields["NodeList"]).groups()
    assert sorted(slurm_session.output(job).splitlines()) == [f"0 n{nodes[0]} 0,1", f"1 n{nodes[1]} 0,1"]


def test_a_command_that_fails_says_why(slurm_session):
    with pytest.raises(CommandError, match="invalid partition"):
        slurm_session.submit("--partition=none", "--wrap", "true")


@pytest.mark.parametrize("proctrack", ["linuxproc", "pgid"])
def test_a_signal_reaches_the_step_and_its_tree_or_not(proctrack, task):
    with SlurmCluster(proctrack=proctrack) as cluster:
        job = cluster.submit(*wrap(task))
        cluster.wait_for_output(job, "begin")
        cluster.wait_for_output(job, "worker is ready")
        cluster.run("scancel", "--signal=USR2", job)
        cluster.wait_for_output(job, "agent USR2")
        if proctrack == "linuxproc":
            cluster.wait_for_output(job, "worker USR2")
        time.sleep(0.5)
        assert ("worker USR2" in cluster.output(job)) == (proctrack == "linuxproc")


def test_an_urgent_job_preempts_and_the_other_comes_back(slurm_session, task):
    job = slurm_session.submit("--nodelist=n3", "--exclusive", *wrap(task))
    slurm_session.wait_for_output(job, "begin 0")
    urgent = slurm_session.submit("--partition=urgent", "--nodelist=n3", "--exclusive", "--wrap", "sleep 1")
    slurm_session.wait_for(urgent, "COMPLETED")
    slurm_session.wait_for_output(job, "begin 1")
    assert "DUE TO PREEMPTION" in slurm_session.output(job)
    assert "agent TERM" in slurm_session.output(job)
    slurm_session.run("scancel", job)


def test_a_node_that_goes_down_ends_its_job_which_comes_back_elsewhere(slurm_session, task):
    job = slurm_session.submit("--nodes=2", "--exclude=n3,n4", "--exclusive", *wrap(task))
    slurm_session.wait_for_output(job, "n2 begin 0")
    slurm_session.wait_for_output(job, "n1 begin 0")
    slurm_session.node_down("n2")
    assert slurm_session.node_states()["n2"] == "DOWN"
    slurm_session.wait_for(job, "PENDING", restarts=1)
    assert "n1 agent TERM" in slurm_session.output(job)
    assert "n2 agent TERM" not in slurm_session.output(job)  # switched off
    slurm_session.run("scontrol", "update", f"JobId={job}", "ExcNodeList=n2,n4")
    slurm_session.wait_for_output(job, "n3 begin 1")
    slurm_session.node_up("n2")
    slurm_session.run("scancel", job)


def test_the_time_limit_sends_its_signal_and_then_ends_the_job(slurm_session, limited):
    fields = slurm_session.wait_for(limited, "TIMEOUT")
    output = slurm_session.output(limited)
    assert output.index("agent USR2") < output.index("agent TERM")
    assert "DUE TO TIME LIMIT" in output
    assert fields["Restarts"] == "0"  # Slurm requeues nobody for that


def test_a_controller_that_dies_finds_its_jobs_again(slurm_session, task):
    job = slurm_session.submit("--nodelist=n1", *wrap(task))
    slurm_session.wait_for_output(job, "begin")
    slurm_session.kill_controller()
    with pytest.raises(CommandError, match="is DOWN"):
        slurm_session.run("scontrol", "ping")
    slurm_session.start_controller()
    fields = slurm_session.job(job)
    assert (fields["JobState"], fields["Restarts"]) == ("RUNNING", "0")
    slurm_session.run("scancel", "--signal=USR2", job)
    slurm_session.wait_for_output(job, "agent USR2")
    slurm_session.restore()
    assert slurm_session.node_states() == dict.fromkeys(["n1", "n2", "n3", "n4"], "IDLE")


def test_the_next_test_meets_no_process_of_this_one(slurm_session, tmp_path):
    task = write_task(tmp_path)
    job = slurm_session.submit("--wrap", f"setsid --fork {task} orphan; {task} agent")
    slurm_session.wait_for_output(job, "begin")
    assert len(processes_with(task)) >= 2
    slurm_session.restore()
    assert processes_with(task) == []
    assert slurm_session.wait_for(slurm_session.submit("--nodes=4", "--wrap", "srun true"), "COMPLETED")


def test_accounting_remembers_how_jobs_ended():
    with SlurmCluster(accounting=True) as cluster:
        jobs = [cluster.submit("--wrap", command) for command in ("true", "exit 3")]
        cluster.wait_for(jobs[0], "COMPLETED")
        cluster.wait_for(jobs[1], "FAILED")
        command = ("sacct", "--allocations", "--noheader", "--parsable2", "--format=jobid,state,exitcode")
        expected = [f"{jobs[0]}|COMPLETED|0:0", f"{jobs[1]}|FAILED|3:0"]
        end = time.monotonic() + 120  # the controller reports in its own time
        while (found := cluster.run(*command).splitlines()) != expected and time.monotonic() < end:
            time.sleep(0.2)
        assert found == expected


def test_without_accounting_there_is_no_sacct(slurm_session):
    with pytest.raises(CommandError, match="accounting storage is disabled"):
        slurm_session.run("sacct")


def test_nothing_is_left_when_it_ends(tmp_path):
    task = write_task(tmp_path)
    with SlurmCluster() as cluster:
        job = cluster.submit("--nodes=2", *wrap(task))
        cluster.wait_for_output(job, "begin")
        assert len(processes_with(cluster.folder)) >= 10
        assert processes_with(task)
        processes = cluster.processes()
    assert processes_with(cluster.folder) == processes_with(task) == []
    assert [process for process in processes if Path("/proc", str(process)).exists()] == []
    assert not cluster.folder.exists()


def test_nothing_is_left_when_the_tests_are_killed(tmp_path):
    task = write_task(tmp_path)
    code = f"""
import time
from slurm_cluster import SlurmCluster
cluster = SlurmCluster().__enter__()
job = cluster.submit("--nodes=2", *{wrap(task)!r})
cluster.wait_for_output(job, "begin")
print(cluster.folder, flush=True)
time.sleep(100)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    ) as tests:
        folder = Path(tests.stdout.readline().strip())
        assert len(processes_with(folder)) >= 10
        tests.send_signal(signal.SIGKILL)
    end = time.monotonic() + 120
    while (processes_with(folder) or folder.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_with(folder) == processes_with(task) == []
    assert not folder.exists()
