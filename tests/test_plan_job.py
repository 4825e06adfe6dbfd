"""`wavefleet plan --cluster` and `submit --dry-run` say what a job would be, truly, and touch nothing."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from asr_train.errors import RecipeError
from asr_train.files import append_jsonl
from asr_train.recipe import load_recipe
from asr_train.run_dir import RunDir
from launch import node_agent, plan
from launch.child import Ended, Signals
from launch.jobs import submit
from launch.node.hang import HangWatch
from launch.site.cluster import load_cluster
from launch.site.findings import NodeFacts, findings, keep
from launch.site.settings import JobSettings
from launch.site.slurm import SlurmError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "submit_dry_run.sh"
GOLDEN_PROFILE = {
    "partition": "gpu", "account": "speech", "qos": "long", "constraint": "a100&ib", "nodes": 2, "gpus_per_node": 4,
    "gpu_type": "a100", "cpus_per_node": 64, "memory": "480G", "time": "2-00:00:00", "signal_lead_s": 600,
    "setup": "source /etc/profile.d/modules.sh", "modules": ["cuda/12.4"], "cache": "/shared/models",
    "environment": {"NCCL_DEBUG": "WARN", "GREETING": "it's $HOME"}, "srun": ["--mpi=pmix"],
    "sbatch": {"mail-user": "me@site.org", "exclusive": True},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def recipe(tiny_recipe_file, folder):
    """The words of a command line that name a recipe and its run directory."""
    return [str(tiny_recipe_file(units_per_step=8)), f"run_dir={folder}"]


@pytest.fixture
def profile(tmp_path):
    def profile(**values):
        path = tmp_path / "site.yaml"
        basis = {"nodes": 2, "gpus_per_node": 0, "cpus_per_node": 2, "time": 90, "signal_lead_s": 90}
        path.write_text(json.dumps({**basis, "shared": str(tmp_path / "shared"), **values}))
        return str(path)

    return profile


@pytest.fixture
def planned(recipe, profile, capsys):
    """What `plan --json` says for a profile."""

    def planned(*overrides, **values):
        assert plan.main([*recipe, *overrides, "--cluster", profile(**values), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return planned


@pytest.fixture(autouse=True)
def no_slurm_of_this_machine(monkeypatch, tmp_path):
    """Commands ask no cluster unless a test gives them one."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def wavefleet(cluster, *arguments):
    return cluster.wavefleet(*arguments).stdout


# --- the batch text -----------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_golden_text(recipe, profile, folder, capsys):
    """Paths and Python are replaced by what they are."""
    assert submit.main([*recipe, "--cluster", profile(**GOLDEN_PROFILE), "--dry-run"]) == 0
    text = capsys.readouterr().out
    text = text.replace(str(submit.code_of(RunDir(folder))), "CODE")
    text = text.replace(str(folder), "RUN").replace(shlex.quote(sys.executable), "PYTHON")
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert not folder.exists()


@pytest.mark.parametrize(("verb", "more"), [(submit, ["--dry-run"]), (plan, [])])
def test_a_name_may_be_given_to_the_run(verb, more, recipe, profile, tmp_path, capsys, monkeypatch):
    """Also one that would be read as a number."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan.slurm, "expected_start", lambda text: "")
    assert verb.main([recipe[0], "--cluster", profile(), "--name", "007", *more]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --job-name=007\n" in said
    assert f"{tmp_path}/runs/007-" in said
    with pytest.raises(RecipeError, match="name"):
        verb.main([recipe[0], "--cluster", profile(), "--name", "a/b", *more])


def test_a_dry_run_is_what_slurm_gets(slurm, recipe, profile, folder):
    path = profile(sbatch={"begin": "now+1hour"})
    wavefleet(slurm, "nodes", "--cluster", path, "--add", "n3", "--reason", "slow")
    dry = wavefleet(slurm, "submit", *recipe, "--cluster", path, "--dry-run")
    assert "#SBATCH --exclude=n3\n" in dry
    job = re.search(r"job (\d+)", wavefleet(slurm, "submit", *recipe, "--cluster", path))[1]
    sent = slurm.run("scontrol", "write", "batch_script", job, "-")
    assert sent.strip() == dry.replace("'wavefleet:<run id>'", f"wavefleet:{RunDir(folder).run_id}").strip()
    assert wavefleet(slurm, "submit", *recipe, "--cluster", path, "--dry-run").strip() == sent.strip()


def test_what_doctor_found_decides_how_a_run_goes_on(slurm, recipe, profile, folder):
    path = profile(sbatch={"begin": "now+1hour"})
    wavefleet(slurm, "doctor", "--cluster", path, "--timeout", "0")
    cluster = load_cluster(path)
    node = NodeFacts(
        time=1.8e9, job_id="7", node="n1", addresses=(), address="n1", here=(), requeue_problem="scontrol: denied",
        sbatch_problem=None, shared_problem=None, seen_after_s=0.0, python="3.11",
    )  # fmt: skip
    keep(cluster, path, replace(findings(cluster, path), node=node))
    assert "goes on by     successor" in wavefleet(slurm, "plan", *recipe, "--cluster", path)
    wavefleet(slurm, "submit", *recipe, "--cluster", path)
    assert JobSettings.read(RunDir(folder)).continuation == "successor"


def test_a_dry_run_imports_nothing_heavy(recipe, profile):
    program = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]); assert code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "submit", *recipe, "--cluster", profile(), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


# --- the plan -------------------------------------------------------------------------------------------------------


def test_a_plan_on_a_real_slurm_says_when_the_job_would_start(slurm, recipe, profile, folder, tmp_path):
    path = profile()
    before, jobs = sorted(tmp_path.rglob("*")), set(slurm.jobs())
    said = wavefleet(slurm, "plan", *recipe, "--cluster", path)
    assert re.search(r"^start +Job \d+ to start at \S+ using 4 processors on nodes n\[1-2\]", said, re.MULTILINE)
    assert re.search(r"^at most +0.0 GPU-hours, 3.0 node-hours", said, re.MULTILINE)
    assert said.endswith(wavefleet(slurm, "submit", *recipe, "--cluster", path, "--dry-run"))
    assert sorted(tmp_path.rglob("*")) == before
    assert set(slurm.jobs()) == jobs
    wavefleet(slurm, "nodes", "--cluster", path, "--add", "n1", "--reason", "slow")
    without = wavefleet(slurm, "plan", *recipe, "--cluster", path)
    assert "kept off       n1; `wavefleet nodes` says why\n" in without
    assert re.search(r"^start .* on nodes n\[2-3\]", without, re.MULTILINE)
    refused = wavefleet(slurm, "plan", *recipe, "--cluster", path, "--nodes", 5)
    assert "start          unknown: sbatch --test-only: allocation failure: Requested node configuration" in refused


def test_without_slurm_everything_else_is_said(planned, monkeypatch, folder):
    def missing(text):
        raise SlurmError("sbatch is not on this machine")

    monkeypatch.setattr(plan.slurm, "expected_start", missing)
    found = planned(gpus_per_node=4, cpus_per_node=32, time="1-12:00:00")
    assert (found["expected_start"], found["start_problem"]) == (None, "sbatch is not on this machine")
    assert (found["node_hours"], found["gpu_hours"], found["world_size"]) == (72.0, 288.0, 8)
    assert found["commands"][1]["argv"][-1] == f"run_dir={folder}"
    assert not folder.exists()


def test_a_person_reads_what_a_program_does(recipe, profile, capsys, monkeypatch):
    monkeypatch.setattr(plan.slurm, "expected_start", lambda text: "Job 7 to start at noon")
    assert plan.main([*recipe, "--cluster", profile(environment={"A": "two words"})]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^a job +2 nodes, 2 processes in all, 90 minutes$", said, re.MULTILINE)
    for line in ("start          Job 7 to start at noon", "goes on by     requeue", "  A='two words'"):
        assert f"{line}\n" in said
    assert said.count("accelerate.commands.launch") == 2
    assert "nothing of this run was measured yet" in said


def test_the_signal_lead_is_compared_with_what_the_run_was_measured_to_need(planned, folder, monkeypatch):
    monkeypatch.setattr(plan.slurm, "expected_start", lambda text: "")
    append_jsonl(folder / "metrics.jsonl", {"attempt": 1, "step": 1, "step_time_s": 5.0})
    append_jsonl(folder / "metrics.jsonl", {"attempt": 1, "step": 1, "event": "saved", "seconds": 20.0})
    short, enough = planned(signal_lead_s=109), planned(signal_lead_s=110)
    assert short["signal_lead_needed_s"] == enough["signal_lead_needed_s"] == 110
    assert "signal_lead_s is 109" in short["signal_lead_problem"]
    assert enough["signal_lead_problem"] is None


@pytest.mark.parametrize("nodes", [1, 2])
def test_commands_are_those_that_node_agents_start(nodes, planned, recipe, profile, folder, monkeypatch):
    """Each agent is run up to where it starts its child; address, port and job are known only there."""
    monkeypatch.setattr(plan.slurm, "expected_start", lambda text: "")
    values = {"nodes": nodes, "cpus_per_node": 8, "processes_per_node": 2, "rendezvous_interface": "ib0"}
    threads = 3
    found = planned(**values, environment={"OMP_NUM_THREADS": str(threads), "OTHER": "1"})
    RunDir(folder).make()
    RunDir(folder).claim(load_recipe(*recipe[:1], recipe[1:]))
    JobSettings(code=ROOT, cluster_name="site", cluster=load_cluster(profile(**values)), continuation="requeue").write(
        RunDir(folder)
    )
    monkeypatch.setattr(node_agent.slurm, "hostnames", lambda names: ["n1", "n2"][:nodes])
    monkeypatch.setattr(node_agent.slurm, "node_address", lambda name: "10.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))  # as the batch script exports it
    started = []
    monkeypatch.setattr(
        node_agent, "run_child", lambda command, env, **rest: started.append((command, env)) or Ended(0, None)
    )
    for number, planned_node in enumerate(found["commands"]):
        environ = {"SLURM_JOB_ID": "7", "SLURM_NODEID": str(number), "SLURM_JOB_NODELIST": "n[1-2]"}
        node_agent._train(node_agent._node(RunDir(folder), environ, Signals()), "10.0.0.1", 29500, {})
        command, env = started[number]
        port = command[command.index("--main_process_port") + 1]
        known = {
            "<job id>": "7", "<address of node 0>": "10.0.0.1", "<free port of node 0>": port,
            str(submit.code_of(RunDir(folder))): str(ROOT),
        }  # fmt: skip

        def filled(text, known=known):
            for placeholder, value in known.items():
                text = text.replace(placeholder, value)
            return text

        assert [filled(word) for word in planned_node["argv"]] == command
        of_the_script = {"PYTHONPATH", "OTHER"}
        assert set(planned_node["environment"]) >= of_the_script
        for name in set(planned_node["environment"]) - of_the_script:
            assert filled(planned_node["environment"][name]) == env[name], name
        new = {name for name in env if env[name] != os.environ.get(name)}
        with HangWatch(range(2), load_recipe(recipe[0]).limits, folder / "hangs") as watch:
            of_the_node = set(watch.environment)  # a folder of its own, for its ranks to show what they do
        assert new - of_the_node <= set(planned_node["environment"])


def test_what_submit_would_fetch_is_named(profile, capsys, monkeypatch):
    monkeypatch.setattr(plan.slurm, "expected_start", lambda text: "Job 7 to start at noon")
    command = ["minds14", "units_per_step=8", "--cluster"]
    assert plan.main([*command, profile(cache="/shared/models")]) == 0
    assert re.search(r"^fetched first +\S+/\S+, PolyAI/minds14, into /shared/models$", capsys.readouterr().out, re.M)
    assert plan.main([*command, profile()]) == 0
    assert "fetched first" not in capsys.readouterr().out


def test_python_is_that_of_the_container(planned, monkeypatch):
    monkeypatch.setattr(plan.slurm, "expected_start", lambda text: "")
    found = planned(container={"kind": "apptainer", "image": "x.sif", "python": "/opt/py/bin/python"})
    assert found["commands"][0]["argv"][0] == "/opt/py/bin/python"


def test_what_submit_refuses_is_refused(recipe, profile):
    with pytest.raises(RecipeError, match="keeps 8 of 9 processes busy: ask for fewer with --nodes or cluster"):
        plan.main([*recipe, "--cluster", profile(), "--nodes", "9"])
