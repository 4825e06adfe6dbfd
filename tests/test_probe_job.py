"""Doctor's job and what it does on a node, with a faked Slurm; what is kept of that."""

import json
import os

import pytest
from doctor_inputs import FOUND, load, profile  # noqa: F401  fixtures

from asr_train.errors import RecipeError
from launch.site import probe, probe_job
from launch.site.cluster import site_folder
from launch.site.findings import findings, keep

# ruff: noqa: F811  their names as arguments

# --- kept findings --------------------------------------------------------------------------------------------------


def test_findings_are_read_back_and_others_are_not(load):
    cluster = load()
    assert findings(cluster, "small") is None
    keep(cluster, "small.yaml", FOUND)
    assert findings(cluster, "/elsewhere/small.yaml") == FOUND
    path = site_folder(cluster, "small") / "doctor.json"
    content = json.loads(path.read_text())
    del content["slurm"]["kill_wait_s"]
    path.write_text(json.dumps(content))  # of another version
    assert findings(cluster, "small") is None
    path.write_text("{")
    assert findings(cluster, "small") is None


def test_a_site_folder_that_cannot_be_written_is_refused_by_name(load, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"shared: .*file/small cannot be written: .*; name another"):
        probe_job.look(load(shared=str(tmp_path / "file")), "small", 1.0)


# --- the job, with a faked Slurm --------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Slurm commands that are shell lines; every call is written down, sbatch's script too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def commands(**lines):
        for name, line in lines.items():
            (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\n{line}\n')
            (folder / name).chmod(0o755)
        return calls

    return commands


def test_a_folder_that_nodes_do_not_share_is_told_from_a_job_that_failed(load, commands, monkeypatch):
    monkeypatch.setattr(probe_job, "SEEN_S", 0.5)
    commands(
        sbatch="cat >/dev/null; echo '7;cluster'",
        squeue="echo 'FAILED|JobLaunchFailure|N/A|g1'",
        scontrol="",
        scancel="",
    )
    found = probe_job.look(load(), "small", 5.0)
    assert found.cannot_run
    assert "job 7 ended (FAILED (JobLaunchFailure)), and nothing that it wrote in" in found.problem
    assert "nodes do not share that folder" in found.problem


@pytest.mark.parametrize("state", ["CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_a_job_that_was_ended_from_outside_proves_nothing(state, load, commands, monkeypatch):
    monkeypatch.setattr(probe_job, "SEEN_S", 0.0)
    commands(sbatch="cat >/dev/null; echo 7", squeue=f"echo '{state}|None|N/A|g1'", scontrol="", scancel="")
    found = probe_job.look(load(), "small", 5.0)
    assert not found.cannot_run
    assert f"job 7 ended ({state}) before it looked around; try again" in found.problem


def test_a_job_that_printed_nothing_points_at_its_set_up(load, commands, monkeypatch):
    monkeypatch.setattr(probe_job, "LOG_S", 0.5)
    logs = (
        "sed -n 's/.*--output=\\(.*\\)%j.*/\\1/p' | head -n 1 | while read f; do : > \"${f}7_0_log.out\"; done; echo 7"
    )
    commands(sbatch=logs, squeue="echo 'FAILED|NonZeroExitCode|N/A|g1'", scontrol="", scancel="")
    found = probe_job.look(load(), "small", 5.0)
    assert found.cannot_run
    assert "it printed nothing: a line of `setup` failed, or a module" in found.problem


def test_a_partition_that_takes_no_job_without_a_gpu_is_asked_with_one(load, commands):
    refuse = "if grep -q gres; then echo 7; else echo 'ask for a GPU' >&2; exit 1; fi"
    calls = commands(sbatch=refuse, squeue="echo 'PENDING|QOSGrpGRES|N/A|'", scontrol="", scancel="")
    found = probe_job.look(load(), "small", 0.0)
    assert "job 7 is PENDING (QOSGrpGRES) after 0 s, and was cancelled" in found.problem
    assert not found.cannot_run
    assert [line.split()[0] for line in calls.read_text().splitlines()].count("sbatch") == 2
    assert "scancel 7" in calls.read_text()
    commands(sbatch="cat >/dev/null; echo 'account expired' >&2; exit 1")
    found = probe_job.look(load(), "small", 0.0)
    assert (found.cannot_run, "account expired" in found.problem) == (True, True)


def test_the_probe_job_is_small_and_keeps_what_a_site_needs(load, tmp_path):
    cluster = load(
        partition="gpu", account="lab", memory="0", cpus_per_node=64, gpus_per_node=8, gpu_type="a100", time="2-0",
        sbatch={"exclusive": True, "mail-user": "me"}, setup=["source site.sh"], modules=["cuda"],
    )  # fmt: skip
    text = probe_job.script(cluster, tmp_path, tmp_path / "code", "word", num_gpus=0)
    for line in ("--partition=gpu", "--account=lab", "--nodes=1", "--cpus-per-task=1", "--mem=1G", "--time=5"):
        assert f"#SBATCH {line}\n" in text
    assert "exclusive" not in text
    assert "gres" not in text
    assert "--hold" not in text
    assert "#SBATCH --requeue\n" in text
    assert "source site.sh\nmodule load cuda\n" in text
    one = probe_job.script(cluster, tmp_path, tmp_path / "code", "word", num_gpus=1)
    assert "#SBATCH --gres=gpu:a100:1\n" in one


def test_what_does_not_work_on_a_node_is_found_there(commands, tmp_path):
    (tmp_path / probe.HERE).write_text("another")
    (tmp_path / probe.SCRIPT).write_text("#!/bin/sh\n")
    environ = {"SLURMD_NODENAME": "no-such-node.invalid", "SLURM_JOB_ID": "7"}
    commands(
        scontrol='case "$*" in *"show job"*) echo "JobId=7 Requeue=0";; *) echo "NodeName=g1 NodeAddr=10.0.0.5";; esac',
        sbatch="echo 'submission from nodes is disabled' >&2; exit 1",
    )
    found = probe.look(tmp_path, "word", environ)
    assert "Requeue=0" in found["requeue_problem"]
    assert "submission from nodes is disabled" in found["sbatch_problem"]
    assert "another content" in found["shared_problem"]
    assert (found["addresses"], found["address"]) == ([], "10.0.0.5")
    commands(scontrol="echo 'access denied' >&2; exit 1", sbatch="echo 'Job 8 to start' >&2")
    (tmp_path / probe.HERE).unlink()
    found = probe.look(tmp_path, "word", environ)
    assert "access denied" in found["requeue_problem"]
    assert found["sbatch_problem"] is None
    assert "not seen on the node" in found["shared_problem"]
    assert found["address"] is None
