"""`wavefleet doctor` on a real Slurm."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_inputs import profile  # noqa: F401  fixtures
from slurm_cluster import SlurmCluster

from launch.site.cluster import load_cluster
from launch.site.findings import Partition, findings

# ruff: noqa: F811  their names as arguments


def ask_doctor(cluster, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "doctor", *map(str, arguments)],
        env={**cluster.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def of_level(text, level):
    """What a printed report says at a level: about -> text."""
    lines = (line.removeprefix(level).split("  ", 1) for line in text.splitlines() if line.startswith(f"{level} "))
    return {about.strip(): rest.strip() for about, rest in ((" ".join(x).strip().split("  ", 1)) for x in lines)}


# --- on a real Slurm --------------------------------------------------------------------------------------------


def test_a_cluster_is_looked_at_by_a_job_and_what_was_found_stays(slurm, profile, tmp_path):
    path = profile()
    said = ask_doctor(slurm, "--cluster", path)
    assert "looks around on a node" in said.stderr
    fine, problems = of_level(said.stdout, "ok"), of_level(said.stdout, "problem")
    assert set(problems) == {"preemption", "accounting", "address"}
    assert said.stdout.startswith("problem")
    assert "Slurm accounting storage is disabled" in problems["accounting"]
    assert "SIGTERM alone" in problems["preemption"]
    assert "KillWait, 5 s" in problems["preemption"]
    assert fine["a job"].startswith("Slurm 22.05")
    assert "every process of a job" in fine["signals"]
    assert "scontrol works there" in fine["going on"]
    assert "up to 1000 tasks" in fine["arrays"]
    assert "written there and seen here" in fine["shared folder"]

    found = findings(load_cluster(path), path)
    assert found.slurm.partitions[0] == Partition(
        name="batch", state="UP", time_min=7 * 24 * 60, max_nodes=None, grace_s=0, preempt_mode="REQUEUE"
    )
    assert found.slurm.kill_wait_s == 5
    assert found.node.node in ("n1", "n2", "n3", "n4")
    assert (found.node.requeue_problem, found.node.sbatch_problem, found.node.shared_problem) == (None, None, None)
    assert [entry.name for entry in (tmp_path / "shared" / "small").iterdir()] == ["doctor.json"]

    again = json.loads(ask_doctor(slurm, "--cluster", path, "--no-job", "--json").stdout)
    assert again["findings"]["node"]["job_id"] == found.node.job_id
    assert (again["can_run"], again["continuation"]) == (True, "requeue")
    assert set(slurm.jobs()) >= {found.node.job_id}


@pytest.mark.slurm
def test_another_site_is_told_apart(profile):
    """Accounting, signals that reach agents alone, a grace time, no arrays, JobRequeue=0."""
    settings = {"KillWait": "30", "JobRequeue": "0", "MaxArraySize": "1", "AccountingStorageEnforce": "associations"}
    signals = {"proctrack": "pgid", "grace_s": 600, "SlurmctldParameters": "preempt_send_user_signal"}
    with SlurmCluster(accounting=True, **signals, **settings) as other:
        said = ask_doctor(other, "--cluster", profile(account="speech", partition="batch,urgent")).stdout
        refused = ask_doctor(other, "--cluster", profile(account="nobody"), code=4).stdout
    assert set(of_level(said, "problem")) == {"arrays", "address"}
    for part in (
        "sacct answers", "the node agents alone (proctrack/pgid)", "told by USR2, and SIGTERM; GraceTime is 600 s",
        "jobs of urgent are not preempted", "JobRequeue=0 does not matter", "MaxArraySize=1",
        "scontrol works there",  # the job asked for --requeue by name
    ):  # fmt: skip
        assert part in said
    assert "Invalid account" in of_level(refused, "cannot run")["a job"]
    assert "Invalid account" in of_level(refused, "cannot run")["a node"]


def test_a_job_that_does_not_start_in_time_is_cancelled_and_it_is_said_why(slurm, profile):
    path = profile(sbatch={"begin": "now+1hour"})
    said = ask_doctor(slurm, "--cluster", path, "--timeout", 2)
    problem = of_level(said.stdout, "problem")["a node"]
    assert "is PENDING (BeginTime), expected to start at" in problem
    assert "after 2 s, and was cancelled" in problem
    assert "is PENDING (BeginTime)" in said.stderr
    assert {fields["JobState"] for fields in slurm.jobs().values() if fields["JobName"] == "wavefleet-doctor"} <= {
        "CANCELLED", "COMPLETED",
    }  # fmt: skip


def test_ctrl_c_cancels_the_job(slurm, profile):
    command = [sys.executable, "-m", "launch.cli", "doctor", "--cluster", profile(sbatch={"begin": "now+1hour"})]
    environ = {**slurm.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        job = re.search(r"job (\d+) looks around", process.stderr.readline())[1]
        process.stderr.readline()  # it waits
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    assert slurm.job(job)["JobState"] == "CANCELLED"


def test_python_that_does_not_start_on_a_node_means_that_no_run_can(slurm, profile):
    said = ask_doctor(slurm, "--cluster", profile(environment={"PYTHONHOME": "/nowhere"}), code=4)
    refusal = of_level(said.stdout, "cannot run")["a node"]
    assert "before it looked around; its last lines:" in refusal
    assert "encodings" in said.stdout


def test_a_profile_that_slurm_refuses_cannot_run(slurm, profile):
    said = ask_doctor(slurm, "--cluster", profile(partition="nope"), "--no-job", code=4)
    refused = of_level(said.stdout, "cannot run")
    assert "knows no partition nope" in refused["partition"]
    assert "refuses a job of this profile" in refused["a job"]
    assert "Invalid partition name" in said.stdout
