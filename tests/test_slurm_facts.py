"""What Slurm says of itself, in any version."""

import pytest
from doctor_inputs import load, profile  # noqa: F401  fixtures

from launch.site import slurm as slurm_commands
from launch.site import slurm_facts
from launch.site.slurm import SlurmError

# ruff: noqa: F811  their names as arguments

CONFIG = """Configuration data as of 2026-11-22T22:23:40
JobRequeue              = {requeue}
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptParameters       = {preempt}
PreemptType             = preempt/partition_prio
ProctrackType           = proctrack/cgroup
SlurmctldParameters     = {slurmctld}
SLURM_VERSION           = {version}

Slurmctld(primary) at head is UP
"""
PARTITIONS = (
    "PartitionName=long Default=NO GraceTime=0 MaxNodes=8 MaxTime=30-00:00:00 PreemptMode=OFF State=UP\n"
    "PartitionName=gpu Default=YES GraceTime=300 MaxNodes=UNLIMITED MaxTime=UNLIMITED PreemptMode=GANG,SUSPEND "
    "State=DRAIN\n"
)


@pytest.fixture
def facts(load, monkeypatch):
    """What `ask` makes of a configuration; `sacct` raises an error or answers."""

    def facts(partition=None, sacct=None, config=CONFIG, **values):
        values = {"requeue": 1, "preempt": "(null)", "slurmctld": "(null)", "version": "23.11.10", **values}

        def run(*command):
            if command[0] == "sacct":
                if sacct is not None:
                    raise SlurmError(sacct)
                return ""
            return PARTITIONS if "partition" in command else config.format(**values)

        monkeypatch.setattr(slurm_commands, "run", run)
        return slurm_facts.ask(load(partition=partition))

    return facts


@pytest.mark.parametrize("version", ["19.05.8", "22.05.8", "23.11.10-2.el9", "24.05.0-0rc1", "25.05.3+wmf1"])
def test_any_version_is_read(version, facts):
    assert facts(version=version).version == version


@pytest.mark.parametrize(
    ("slurmctld", "preempt", "expected"),
    [
        ("(null)", "(null)", False),
        ("cloud_dns,preempt_send_user_signal", "(null)", True),
        ("(null)", "reorder_count=2,send_user_signal", True),  # newer versions
    ],
)
def test_the_user_signal_is_found_where_either_version_has_it(slurmctld, preempt, expected, facts):
    assert facts(slurmctld=slurmctld, preempt=preempt).sends_user_signal is expected


def test_what_a_version_does_not_say_is_unknown(facts):
    found = facts(config="SLURM_VERSION = 99.01\n")
    assert (found.proctrack, found.kill_wait_s, found.job_requeue, found.max_array_size) == (None, None, None, None)
    assert found.preempt_type is None


def test_partitions_are_those_of_the_profile_or_the_default(facts):
    assert [partition.name for partition in facts().partitions] == ["gpu"]
    found = facts(partition="long,gpu,other")
    assert [(partition.name, partition.time_min, partition.max_nodes) for partition in found.partitions] == [
        ("long", 43200, 8),
        ("gpu", None, None),
    ]
    assert found.unknown_partitions == ("other",)
    assert [partition.state for partition in found.partitions] == ["UP", "DRAIN"]


def test_a_missing_sacct_is_a_finding_and_no_error(facts):
    assert facts(sacct="sacct is not on this machine").accounting_problem == "sacct is not on this machine"
    assert facts().accounting_problem is None


def test_requeue_0_is_read(facts):
    assert facts(requeue=0).job_requeue is False
