"""The batch text that a profile makes: read by Slurm and bash as it was meant, whatever stands in it."""

import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import submitit
from profiles import HOSTILE, ROOT, errors, load, text_of, write  # noqa: F401  fixtures

from asr_train.errors import RecipeError
from launch import cli
from launch.site.cluster import to_json
from launch.site.sbatch import python_command, sbatch_text, submitit_parameters

# ruff: noqa: F811  their names as arguments


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """srun and module on PATH that write down what they were given; runs a batch script, returns srun's argv."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "module"):
        program = (
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"with open(os.environ['RECORD'] + '.{name}', 'a') as f:\n"
            "    f.write(json.dumps({'argv': sys.argv[1:], 'environ': dict(os.environ)}) + '\\n')\n"
        )
        (programs / name).write_text(program)
        (programs / name).chmod(0o755)
    record = tmp_path / "record"
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    work = tmp_path / "work"
    work.mkdir()

    def run(text, check=True):
        script = tmp_path / "job.sh"
        script.write_text(text)
        subprocess.run(["bash", "-n", str(script)], check=True)
        done = subprocess.run(["bash", str(script)], cwd=work, capture_output=True, text=True, check=False)
        assert not check or (done.returncode, done.stderr) == (0, "")
        assert list(work.iterdir()) == []  # nothing was injected
        calls = {}
        for name in ("srun", "module"):
            path = Path(f"{record}.{name}")
            calls[name] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            path.unlink(missing_ok=True)
        return calls

    return run


@pytest.fixture
def sbatch_reads(tmp_path):
    """Option -> value as the real sbatch reads them from a script; nothing is submitted, for no controller answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    config = tmp_path / "slurm.conf"
    config.write_text(
        f"ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={port}\nAuthType=auth/none\n"
        "NodeName=n1\nPartitionName=p Nodes=n1\n"
    )

    def read(text):
        script = tmp_path / "job.sh"
        script.write_text(text)
        command = ["sbatch", "-vv", "--test-only", str(script)]
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        environ |= {"SLURM_CONF": str(config), "LC_ALL": "C.UTF-8"}
        lines = []
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as sbatch:
            for line in sbatch.stderr:
                lines.append(line.rstrip("\n"))
                if "end of defined options" in line:
                    sbatch.kill()  # from here on it only looks for a controller
                    break
            else:
                pytest.fail("\n".join(lines))
        pairs = (line.removeprefix("sbatch: ").partition(": ") for line in lines if " : " in line)
        return {key.strip(): value for key, _, value in pairs}

    return read


# --- the batch text ---------------------------------------------------------------------------------------------


def test_sbatch_reads_every_option_as_it_was_meant(load, sbatch_reads):
    cluster = load(
        "partition=long", "account=lab", "qos=high", "reservation=week", "constraint=a100&ib", "gpus_per_node=4",
        "gpu_type=a100", "memory=64G", "time=2-00:00:00", "signal_lead_s=240", "sbatch.mail-user=a@b.org",
        "sbatch.exclusive=true", "setup=['true #SBATCH --nice']",
    )  # fmt: skip
    read = sbatch_reads(
        text_of(cluster, nodes=2, exclude=["n3", "n4"], dependency="afterany:12", comment="a comment", job_name="run")
    )
    expected = {
        "partition": "long", "account": "lab", "qos": "high", "reservation": "week", "constraint": "a100&ib",
        "mem": "64G", "time": "2-00:00:00", "signal": "USR2@240", "mail-user": "a@b.org", "nodes": "2",
        "ntasks-per-node": "1", "cpus-per-task": "4", "exclude": "n3,n4", "dependency": "afterany:12",
        "kill-on-invalid-dep": "yes", "comment": "a comment", "job-name": "run", "hold": "set", "requeue": "requeue",
        "exclusive": "exclusive", "open-mode": "a",
    }  # fmt: skip
    assert {key: read.get(key) for key in expected} == expected
    assert read["gres"].endswith("gpu:a100:4")
    assert {"wckey", "nice"} & set(read) == set()


def test_a_job_may_be_requeued_and_may_start_at_once(load):
    text = text_of(load(), hold=False)
    assert "#SBATCH --requeue\n" in text
    assert "--hold" not in text


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_arrive_as_they_are_and_nothing_runs(value, load, fake_slurm, sbatch_reads, tmp_path):
    cluster = load(
        partition=value, account=value, modules=[value], environment={"PLAIN": value}, srun=[f"--label={value}"],
        sbatch={"mail-user": value},
    )  # fmt: skip
    folder = tmp_path / value.replace("/", "_").replace("%", "")
    text = text_of(cluster, folder, f"python {shlex.quote(value)}", job_name=value, comment=value)

    read = sbatch_reads(text)
    assert {read[key] for key in ("job-name", "comment", "partition", "account", "mail-user")} == {value}
    assert read["output"] == f"{folder}/%j_0_log.out"
    assert set(read) <= {
        "account", "comment", "cpus-per-task", "error", "hold", "job-name", "mail-user", "nodes", "ntasks-per-node",
        "open-mode", "output", "partition", "requeue", "signal", "test-only", "time", "verbose",
    }  # fmt: skip

    calls = fake_slurm(text)
    (srun,) = calls["srun"]
    assert srun["argv"] == [
        "--unbuffered", "--output", f"{folder}/%j_%t_log.out", "--error", f"{folder}/%j_%t_log.err",
        "--cpus-per-task=4", "--kill-on-bad-exit=1", "--wait=60", "--export=ALL", f"--label={value}", "python", value,
    ]  # fmt: skip
    assert srun["environ"]["PLAIN"] == value
    assert [call["argv"] for call in calls["module"]] == [["load", value]]


@pytest.mark.parametrize("value", ["two\nlines", "two\n#SBATCH --uid=0", "back\\slash", "a\\'", "\r", "nul\0", "", " "])
def test_what_an_sbatch_line_cannot_hold_is_refused_everywhere(value, load, errors):
    for field in ("partition", "account", "constraint", "srun", "modules"):
        assert f"{field}" in errors(**{field: value})
    assert "sbatch.mail-user" in errors(sbatch={"mail-user": value})
    cluster = load()
    for argument in ("job_name", "comment", "dependency"):
        with pytest.raises(RecipeError, match=argument):
            text_of(cluster, **{argument: value})
    with pytest.raises(RecipeError, match="exclude"):
        text_of(cluster, exclude=[value])
    with pytest.raises(RecipeError, match="partition"):  # a value that came past the profile's checks
        text_of(replace(cluster, partition=value))
    if value.strip():
        with pytest.raises(RecipeError, match="folder"):
            text_of(cluster, Path("/shared") / value.strip("\r") if value != "\r" else Path("/shared/\r"))


def test_folders_that_slurm_would_rewrite_are_refused(load):
    with pytest.raises(RecipeError, match="no %"):
        text_of(load(), Path("/shared/100%done"))
    with pytest.raises(RecipeError, match="absolute"):
        text_of(load(), Path("runs/one"))
    with pytest.raises(RecipeError, match="command"):
        text_of(load(), command="python\nrm")


def test_environment_lines_of_several_lines_are_refused(errors):
    assert "environment.A: 'x\\ny': should be one line" in errors(environment={"A": "x\ny"})


def test_set_up_comes_first_then_modules_then_the_environment(load, fake_slurm):
    cluster = load(setup="export EARLY=1\nLATE=$EARLY$EARLY; export LATE", modules="cuda/12.4", cache="/models")
    calls = fake_slurm(text_of(replace(cluster, environment={"EARLY": "$LATE"})))
    assert calls["module"][0]["environ"]["LATE"] == "11"
    environ = calls["srun"][0]["environ"]
    assert (environ["EARLY"], environ["LATE"]) == ("$LATE", "11")  # environment is literal
    assert environ["HF_HOME"] == "/models"
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_a_failed_set_up_line_ends_the_job_before_it_starts(load, fake_slurm):
    assert fake_slurm(text_of(load(setup=["false"])), check=False)["srun"] == []


def test_the_environment_of_the_cache_cannot_be_contradicted(errors):
    assert "environment.HF_HOME: `cache` sets this" in errors(cache="/models", environment={"HF_HOME": "/other"})


def test_a_token_travels_through_the_environment_and_stands_nowhere(load, fake_slurm, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    cluster = load("environment.A=b", "cache=/models")
    text = text_of(cluster, command=python_command(cluster))
    assert "hf_planted" not in text + json.dumps(to_json(cluster)) + repr(
        submitit_parameters(cluster, job_name="a", nodes=1)
    )
    text = text_of(cluster)
    assert fake_slurm(text)["srun"][0]["environ"]["HF_TOKEN"] == "hf_planted"


@pytest.mark.parametrize("kind", ["none", "apptainer", "pyxis"])
def test_python_runs_in_the_container(kind, load, fake_slurm):
    container = {"kind": kind, "image": "docker://a b", "mounts": ["/data:/d ata"], "python": "/opt/my python"}
    cluster = load("gpus_per_node=1", **({"container": container} if kind != "none" else {}))
    argv = fake_slurm(text_of(cluster, command=f"{python_command(cluster)} -m x"))["srun"][0]["argv"]
    after = argv[argv.index("--export=ALL") + 1 :]
    expected = {
        "none": [sys.executable],
        "apptainer": ["apptainer", "exec", "--nv", "--bind", "/data:/d ata", "docker://a b", "/opt/my python"],
        "pyxis": ["--container-image=docker://a b", "--container-mounts=/data:/d ata", "/opt/my python"],
    }
    assert after == [*expected[kind], "-m", "x"]


def test_submitit_takes_the_parameters_and_writes_the_same_text(load, fake_slurm, tmp_path):
    cluster = load("memory=4G", "gpus_per_node=2")
    parameters = submitit_parameters(cluster, job_name="it's", nodes=2, comment="why")
    executor = submitit.SlurmExecutor(folder=tmp_path / "jobs", python=python_command(cluster))
    executor.update_parameters(**parameters)
    command = executor._submitit_command_str
    assert executor._make_submission_file_text(command, "") == sbatch_text(parameters, tmp_path / "jobs", command)


def test_nothing_heavy_is_imported_before_a_text_is_made():
    heavy = ["submitit", "torch", "transformers", "datasets", "accelerate"]
    program = (
        "import sys, launch.site.cluster, launch.site.sbatch\n"
        "launch.site.cluster.to_json(launch.site.cluster.load_cluster('test'))\n"
        f"print(sorted(set(sys.modules) & set({heavy})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_mail_comes_at_the_end_and_not_when_a_run_goes_on(capsys):
    asked = ["submit", "demo", "units_per_step=4", "--cluster", "test", "--mail", "me@site.org", "--dry-run"]
    assert cli.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "#SBATCH --mail-user=me@site.org" in lines
    assert "#SBATCH --mail-type=END,FAIL,INVALID_DEPEND" in lines
