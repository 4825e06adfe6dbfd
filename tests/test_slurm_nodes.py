"""Bad nodes on a real Slurm: one that fails its check is excluded, and the run goes on elsewhere to its end."""

import json
import subprocess
from collections import Counter

import pytest
from test_slurm_jobs import WAVEFLEET, losses, submitted, verdicts, wait_until, wavefleet

from asr_train.files import read_jsonl
from launch import exclusions


@pytest.fixture
def cluster(slurm):
    return slurm


@pytest.fixture
def profile(tmp_path):
    """A function: lines of YAML to add -> the path of a profile of two nodes."""

    def make(*lines):
        path = tmp_path / "small.yaml"
        path.write_text(
            "nodes: 2\ngpus_per_node: 0\ncpus_per_node: 1\ntime: 30\nsignal_lead_s: 30\nprocesses_per_node: 1\n"
            f"shared: {tmp_path / 'shared'}\n"
            "environment: {OMP_NUM_THREADS: 1, TOKENIZERS_PARALLELISM: 'false'}\n" + "\n".join(lines) + "\n"
        )
        return str(path)

    return make


@pytest.fixture
def recipe_file(tiny_corpus, tiny_recipe_file):
    changes = {"log.every": 1, "log.trained_ids": True, "num_workers": 0}
    return str(tiny_recipe_file(max_steps=None, max_epochs=2, units_per_step=3, **changes))


def ids_by_step(folder):
    """Step -> ids, of the ranks together."""
    found = {}
    for path in (folder / "trained_ids").glob("*.jsonl"):
        for line in read_jsonl(path):
            found.setdefault(line["step"], []).extend(line["ids"])
    return found


def excluded(cluster, profile):
    return json.loads(wavefleet(cluster, "nodes", "--cluster", profile, "--json").stdout)


def test_a_node_that_always_fails_its_check_is_excluded_and_the_run_goes_on_elsewhere(
    cluster, profile, recipe_file, tiny_corpus, tmp_path
):
    """The corpus is read from each node's own disk meanwhile, which is clean at the end."""
    scratch = tmp_path / "scratch"
    bad = profile(
        "preflight: 'if [ \"$SLURMD_NODENAME\" = n2 ]; then echo /scratch is not mounted; exit 1; fi'",
        f"stage_corpus_to: {scratch}",
    )
    folder = tmp_path / "run"
    job = submitted(cluster, bad, recipe_file, folder)
    found = wait_until(cluster, folder, lambda found: found["state"] == "done" and len(verdicts(folder)) == 2)
    assert verdicts(folder) == ["preflight", "done"]
    assert (found["job_id"], found["attempts"]) == (job, 1)
    first = next(read_jsonl(folder / "verdicts.jsonl"))
    assert first["hosts"] == ["n2"]
    assert "/scratch is not mounted" in first["message"]
    assert cluster.job(job)["ExcNodeList"] == "n2"

    # What was learned is there for people and for other runs.
    (row,) = excluded(cluster, bad)
    assert (row["host"], row["run"], row["slurm"]) == ("n2", str(folder), "idle")
    assert "/scratch is not mounted" in row["reason"]
    other = submitted(cluster, bad, recipe_file, tmp_path / "other", "cluster.sbatch.begin=now+1hour")
    assert cluster.job(other)["ExcNodeList"] == "n2"
    wavefleet(cluster, "cancel", tmp_path / "other")

    # The run is the uninterrupted one's, read from each node's own copy of the corpus.
    local = [*WAVEFLEET, "train", recipe_file, f"run_dir={tmp_path / 'local'}", "--processes", "1"]
    subprocess.run(local, check=True, capture_output=True)
    expected = losses(tmp_path / "local")
    assert set(losses(folder)) == set(expected)
    for step, loss in losses(folder).items():
        assert abs(loss - expected[step]) <= 1e-5 * abs(loss)
    seen = Counter(name for names in ids_by_step(folder).values() for name in names)
    assert set(seen.values()) == {2}  # epochs
    assert len(seen) == len(tiny_corpus.train)
    said = "".join(path.read_text() for path in (folder / "slurm").glob("*_log.err"))
    said += "".join(path.read_text() for path in (folder / "logs").rglob("stderr.log"))
    for number in (0, 1):
        assert f"/scratch/wavefleet-{json.loads((folder / 'run.json').read_text())['run_id']}-{number}/" in said
    assert list(scratch.iterdir()) == []


def test_what_is_wrong_on_all_nodes_stops_the_run(cluster, profile, recipe_file, tmp_path):
    """Excluding them would only have others fail, too."""
    bad, folder = profile("preflight: 'echo the licence server is down; exit 1'"), tmp_path / "run"
    submitted(cluster, bad, recipe_file, folder)
    wait_until(cluster, folder, lambda _: verdicts(folder))
    assert verdicts(folder) == ["preflight"]
    verdict = next(read_jsonl(folder / "verdicts.jsonl"))
    assert verdict["action"] == "stop"
    assert "the licence server is down" in verdict["message"]
    assert excluded(cluster, bad) == []


def test_a_node_is_not_excluded_where_too_few_others_are_left(cluster, profile, recipe_file, tmp_path):
    """The job would wait for ever."""
    bad = profile("preflight: 'test \"$SLURMD_NODENAME\" != n2'")
    folder = tmp_path / "run"
    submitted(cluster, bad, recipe_file, folder, "allow_idle_ranks=true", "cluster.nodes=4")
    wait_until(cluster, folder, lambda _: verdicts(folder))
    verdict = next(read_jsonl(folder / "verdicts.jsonl"))
    assert (verdict["kind"], verdict["action"], verdict["exclude_hosts"]) == ("preflight", "stop", [])
    assert "There is no other node to go on with" in verdict["message"]
    assert exclusions.live(tmp_path / "shared" / "small") == []


def test_a_successor_is_kept_off_the_node_too(cluster, profile, recipe_file, tmp_path):
    """Where another job goes on in place of the same one."""
    bad = profile("preflight: 'test \"$SLURMD_NODENAME\" != n2'", "continuation: successor")
    folder = tmp_path / "run"
    job = submitted(cluster, bad, recipe_file, folder)
    successor = wait_until(cluster, folder, lambda found: found["job_id"] != job)["job_id"]
    assert cluster.job(successor)["ExcNodeList"] == "n2"
    wait_until(cluster, folder, lambda found: found["state"] == "running")
    assert "n2" not in expanded(cluster, successor)
    wavefleet(cluster, "cancel", folder)


def expanded(cluster, job):
    return cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
