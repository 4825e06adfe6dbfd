"""Cluster profiles: read and checked like recipes."""

import json
import re
from pathlib import Path

import pytest
from profiles import ROOT, errors, load, text_of, write  # noqa: F401  fixtures

from asr_train import resources
from asr_train.errors import RecipeError
from asr_train.recipe import walk
from launch.site.cluster import accelerate_config, from_json, load_cluster, to_json

# ruff: noqa: F811  their names as arguments

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
