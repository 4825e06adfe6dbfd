"""Cluster profiles for tests, good and bad; fixtures for those who import them."""

from pathlib import Path

import pytest
import yaml

from asr_train.errors import RecipeError
from launch.site.cluster import load_cluster
from launch.site.sbatch import sbatch_text, submitit_parameters

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


def text_of(cluster, folder=Path("/shared/runs/one"), command="true", **asked):
    return sbatch_text(submitit_parameters(cluster, **{"job_name": "job", "nodes": 1, **asked}), folder, command)
