"""Cluster profiles: read and checked like recipes; the batch text says what was meant, also of hostile values."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import submitit
import yaml

from asr_train import resources
from asr_train.errors import RecipeError
from asr_train.recipe import walk
from launch import cli
from launch.site.cluster import accelerate_config, from_json, load_cluster, to_json
from launch.site.sbatch import python_command, sbatch_text, submitit_parameters

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = {"gpus_per_node": 0, "cpus_per_node": 4, "time": 60}
HOSTILE = [
    "two words",
    "it's",
    'say "hello"',
    "$(touch injected)",
    "`touch injected`",
    "a; touch injected #",
    "' --uid=0 '",
    "$HOME",
    "%j #SBATCH --hold",
    "-n 5",
    "--export=NONE",
    "é ü 語",
    "* ? [a-z] {a,b} ~",
    "a|b&c>d<e!f",
]


@pytest.fixture
def write(tmp_path):
    def write(**values):
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **values}))
        return path

    return write


@pytest.fixture
def load(write):
    return lambda *overrides, **values: load_cluster(write(**values), overrides)


@pytest.fixture
def errors(write):
    def errors(*overrides, **values):
        with pytest.raises(RecipeError) as caught:
            load_cluster(write(**values), overrides)
        return str(caught.value)

    return errors


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


def text_of(cluster, folder=Path("/shared/runs/one"), command="true", **asked):
    return sbatch_text(submitit_parameters(cluster, **{"job_name": "job", "nodes": 1, **asked}), folder, command)


# --- reading ----------------------------------------------------------------------------------------------------


def test_shipped_profiles_load_and_make_a_job():
    assert set(resources.shipped("slurm/clusters")) == {"generic", "test"}
    for name in resources.shipped("slurm/clusters"):
        cluster = load_cluster(name)
        assert "#SBATCH --job-name=job\n" in text_of(cluster, nodes=cluster.nodes)


def test_the_page_describes_every_field_and_its_examples_load(tmp_path):
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    keys = [key for key, _, _ in walk(load_cluster("test"))]
    assert [key for key in keys if f"`{key}`" not in page] == []
    examples = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        path = tmp_path / "example.yaml"
        is_whole = "time:" in example  # else a part of a profile, to which what every profile needs is added
        path.write_text(example if is_whole else f"gpus_per_node: 0\ncpus_per_node: 1\ntime: 10\n{example}")
        cluster = load_cluster(path)
        text_of(cluster, nodes=cluster.nodes)


def test_overrides_reach_every_field(load):
    cluster = load(
        "partition=gpu,long", "environment.NCCL_DEBUG=INFO", "sbatch.mail-user=a@b.org", "container.kind=pyxis",
        "container.image=nvcr.io#nvidia/pytorch:24.01-py3", "srun=[--mpi=pmix]", "time=1-12:00:00",
    )  # fmt: skip
    assert cluster.partition == "gpu,long"
    assert cluster.environment == {"NCCL_DEBUG": "INFO"}
    assert cluster.sbatch == {"mail-user": "a@b.org"}
    assert cluster.container.image == "nvcr.io#nvidia/pytorch:24.01-py3"
    assert cluster.time == 36 * 60


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90),
        ("'90'", 90),
        ("12:00:00", 720),  # YAML 1.1 makes 43200 of it
        ("00:00:01", 1),
        ("0:10:01", 11),
        ("1-0", 1440),
        ("2-06:30", 3270),
        ("7-00:00:00", 10080),
    ],
)
def test_times_are_minutes_rounded_up(written, minutes, tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text(f"gpus_per_node: 0\ncpus_per_node: 1\nsignal_lead_s: 1\ntime: {written}\n")
    assert load_cluster(path).time == minutes
    assert load_cluster(path, [f"time={written}"]).time == minutes


@pytest.mark.parametrize("written", ["12:00", "1h", "UNLIMITED", "-5", "1.5", "1-2-3", "0:99:00", "true", "0", "[5]"])
def test_other_times_are_refused(written, errors):
    assert "time: " in errors(f"time={written}")


def test_all_errors_appear_together_with_key_value_and_remedy(errors):
    text = errors(
        "partitoin=gpu", "nodes=0", "memory=64", "time=1h", "gpus_per_node=many", "account=", "qos=2",
        "constraint='a\\b'", "environment.HF_TOKEN=hf_planted", "environment.SLURM_JOB_ID=5", "environment.2X=5",
        "environment.FLAG=on", "sbatch.partition=x", "sbatch.hold=true", "sbatch.mail_user=x", "sbatch.nice=false",
        "srun=[--export=NONE, pmix]", "setup=['#SBATCH --nice', 'export WANDB_API_KEY=abcdef']",
        "container.kind=docker", "signal_lead_s=0", "nonsense",
    )  # fmt: skip
    for expected in (
        "'nonsense': expected key=value",
        "partitoin: no such field; did you mean partition?",
        "nodes: 0: should be greater than or equal to 1",
        "memory: 64: should be a number with its unit, 64G say, or 0",
        "time: '1h': should be minutes, HH:MM:SS or D-HH:MM:SS",
        "gpus_per_node: 'many': should be a valid integer",
        "qos: 2: should be a valid string",
        r"constraint: 'a\\b': should have no backslash",
        "environment.HF_TOKEN: looks like a secret; a profile is copied into sbatch text; export it in the shell",
        "environment.SLURM_JOB_ID: Slurm or submitit sets this itself",
        "environment.2X: should be a variable's name",
        "environment.FLAG: True: should be text; put on, off, yes, no",
        "sbatch.partition: set the field partition",
        "sbatch.hold: this program sets it itself",
        "sbatch.mail_user: should be a long option's name",
        "sbatch.nice: False: should be text, a number, or true",
        "srun.0: --export: this program sets it itself",
        "srun.1: 'pmix': should be --name or --name=value",
        "setup.0: '#SBATCH --nice': sbatch does not read options here",
        "setup.1: WANDB_API_KEY looks like a secret",
        "container.kind: 'docker': should be 'none', 'apptainer' or 'pyxis'",
        "signal_lead_s: 0: should be greater than or equal to 1",
    ):
        assert expected in text
    assert f": {len(text.splitlines()) - 1} errors" in text
    assert "planted" not in text
    assert "abcdef" not in text


def test_contradictions_appear_together(errors):
    text = errors(
        "signal_lead_s=3600", "gpu_type=a100", "processes_per_node=5", "container.image=x.sif", "accelerate=ddp"
    )
    for expected in (
        "signal_lead_s: 3600: should be under the time, 3600 s",
        "gpu_type: 'a100': gpus_per_node is 0",
        "cpus_per_node: 4: should be at least one for each process a node, 5",
        "container.kind: none, and other container fields are set",
        "accelerate: 'ddp': it is for GPUs, and gpus_per_node is 0",
    ):
        assert expected in text
    assert "processes_per_node: 3: gpus_per_node is 2" in errors("gpus_per_node=2", "processes_per_node=3")
    assert "container.image: missing; pyxis needs one" in errors("container.kind=pyxis")
    assert "container.extra.0" in errors("container={kind: pyxis, image: x, extra: --mpi=pmix}")
    assert "accelerate: 'one_gpu': it runs one process, and the nodes have 2 together" in errors(
        "accelerate=one_gpu", "gpus_per_node=1", "nodes=2"
    )
    assert "accelerate: 'dpd': no file 'dpd', and no shipped one" in errors("accelerate=dpd")


@pytest.mark.parametrize("line", ["export HF_TOKEN=$(cat ~/.token)", 'export HF_TOKEN="$MY"', "A_KEY= run --key=value"])
def test_a_secret_that_is_fetched_is_not_in_the_text_and_may_be(line, load):
    assert load(setup=[line]).setup == (line,)


def test_a_switch_that_only_sounds_like_a_secret_is_taken(load):
    assert load(environment={"TOKENIZERS_PARALLELISM": "false"}).environment == {"TOKENIZERS_PARALLELISM": "false"}


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"'nowhere'.*generic, test"):
        load_cluster("nowhere")


def test_relative_paths_become_absolute_and_names_stay(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("distributed_type: MULTI_GPU\nuse_cpu: true\n")
    Path("image.sif").touch()
    container = {"kind": "apptainer", "image": "image.sif", "mounts": ["data:/data:ro", "/scratch", "$TMPDIR:/tmp"]}
    cluster = load(cache="cache", accelerate="own.yaml", container=container)
    assert cluster.cache == str(tmp_path / "cache")
    assert cluster.accelerate == str(tmp_path / "own.yaml")
    assert cluster.container.image == str(tmp_path / "image.sif")
    assert cluster.container.mounts == (f"{tmp_path}/data:/data:ro", "/scratch", "$TMPDIR:/tmp")
    assert load(accelerate="cpu").accelerate == "cpu"


# --- the node agent's part --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "nodes", "accelerate", "processes"),
    [
        ([], None, "cpu", 1),
        (["processes_per_node=2"], 3, "cpu", 2),
        (["gpus_per_node=1"], None, "one_gpu", 1),
        (["gpus_per_node=1"], 2, "ddp", 1),
        (["gpus_per_node=4"], None, "ddp", 4),
        (["gpus_per_node=4", "processes_per_node=1"], None, "one_gpu", 1),
        (["gpus_per_node=4", "accelerate=fsdp2"], None, "fsdp2", 4),
        (["gpus_per_node=2", "accelerate=cpu"], None, "cpu", 2),
    ],
)
def test_processes_and_accelerate_config_follow_the_hardware(overrides, nodes, accelerate, processes, load):
    cluster = load(*overrides, *([] if nodes is None else [f"nodes={nodes}"]))
    assert (accelerate_config(cluster), cluster.num_processes) == (accelerate, processes)


def test_a_profile_travels_as_json(load):
    cluster = load("rendezvous_interface=ib0", "environment.OMP_NUM_THREADS=4", "setup=['a', 'b']", "time=1-00:00:00")
    assert from_json(json.loads(json.dumps(to_json(cluster)))) == cluster


def test_more_nodes_than_the_accelerate_config_can_use_are_refused(load):
    with pytest.raises(RecipeError, match=r"one_gpu.*runs one process"):
        load("gpus_per_node=1", "accelerate=one_gpu", "nodes=2")


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
