"""A profile of a small site, and what is found on a healthy one; fixtures for those who import them."""

import json
from dataclasses import replace

import pytest

from launch.site.cluster import load_cluster
from launch.site.findings import Findings, NodeFacts, Partition, SlurmFacts

PROFILE = {"nodes": 2, "gpus_per_node": 1, "cpus_per_node": 1, "time": 30, "signal_lead_s": 120}


@pytest.fixture
def profile(tmp_path):
    def profile(**values):
        path = tmp_path / "small.yaml"
        path.write_text(json.dumps({**PROFILE, "shared": str(tmp_path / "shared"), **values}))
        return str(path)

    return profile


@pytest.fixture
def load(profile):
    return lambda **values: load_cluster(profile(**values))


# --- what it means ------------------------------------------------------------------------------------------------


SLURM = SlurmFacts(
    version="23.11.10", proctrack="cgroup", kill_wait_s=30, preempt_type="partition_prio", sends_user_signal=True,
    job_requeue=True, max_array_size=1001, accounting_problem=None,
    partitions=(
        Partition(name="gpu", state="UP", time_min=2880, max_nodes=None, grace_s=0, preempt_mode="OFF"),
    ),
)  # fmt: skip
NODE = NodeFacts(
    time=1.8e9, job_id="7", node="g1", addresses=("10.0.0.5",), address="g1", here=("10.0.0.5",), requeue_problem=None,
    sbatch_problem=None, shared_problem=None, seen_after_s=0.0, python="3.11.7",
)  # fmt: skip
FOUND = Findings(time=1.8e9, slurm=SLURM, refused=None, expected_start="Job 8 to start soon", node=NODE)


def changed(found=FOUND, **values):
    """Findings with fields of `slurm`, `node`, the partition, or their own replaced."""
    part = values.pop("partition", None)
    slurm = {key: values.pop(key) for key in list(values) if hasattr(SLURM, key)}
    node = {key: values.pop(key) for key in list(values) if hasattr(NODE, key) and key != "node"}
    if part is not None:
        slurm["partitions"] = (replace(SLURM.partitions[0], **part),)
    return replace(found, **{"slurm": replace(SLURM, **slurm), "node": replace(NODE, **node), **values})
