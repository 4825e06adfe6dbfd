"""What runs meet on a real Slurm besides failing machines: limits of time and memory, people, data, other launchers."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RATE, write_speech
from safetensors.torch import save_file
from slurm_cluster import WAVEFLEET, SlurmCluster
from slurm_conf import SETTINGS
from survivor import Survivor, expected, profile, recipe, reference, survivor  # noqa: F401  fixtures
from test_runs import assert_close, losses

from asr_train.files import append_jsonl, read_jsonl
from asr_train.model import build_model
from asr_train.prepare import prepare

# ruff: noqa: F811  their names as arguments

pytestmark = pytest.mark.slurm


def slurm_has(run):
    """Whether a job of the run is in the queue, or has not ended yet."""
    return run.cluster.run("squeue", "--noheader").strip() != ""


def test_the_time_limit_comes_twice_and_then_memory_is_short(survivor, reference):
    """Two minutes, warned a minute before; submitit takes jobs under ten minutes for timed out whatever happened."""
    run = survivor(max_steps=100_000)
    job = run.submit("cluster.time=2", "cluster.signal_lead_s=60")
    run.trains(attempt=1)
    memory_kb = run.rank(0).memory_info().vms // 1024 + 2 * 2**20
    for attempt in (1, 2):
        run.trains(attempt)
        with run.paused():  # as in a long step: minutes of steps would have to be made once more to compare with
            run.until(run.is_asked_to_stop)
        verdict = run.verdict(attempt)
        assert (verdict["kind"], verdict["action"]) == ("time_limit", "continue")
        assert (verdict["num_lost_steps"], verdict["exit_code"]) == (0, 3)
    assert "The time limit came. Going on from the checkpoint of step" in run.why()
    saved = [line["step"] for line in run.lines("stopped")]
    assert run.resumed_from(2) == saved[0] < saved[1]
    assert run.status()["job_id"] == job
    run.wavefleet("cancel", run.path)  # back in the queue
    run.until(lambda: not slurm_has(run))

    too_large = "model.config.intermediate_size=200000000"  # one of its matrices needs over 12 GB
    run.submit(f"cluster.setup=ulimit -v {memory_kb}", "--allow-change", too_large, f"max_steps={saved[1] + 3}")
    verdict = run.verdict(3)
    assert (verdict["kind"], verdict["action"]) == ("out_of_memory", "stop")
    run.until(lambda: not slurm_has(run))
    assert f"It can go on from the checkpoint of step {saved[1]}" in run.why()
    assert "memory" in run.why()

    run.submit("--retry", "--allow-change", f"max_steps={saved[1] + 3}")
    run.ends_as(reference(saved[1] + 3), max_steps=saved[1] + 3)


@pytest.fixture(scope="module")
def poisoned(recipe, tmp_path_factory):
    """A recipe with one utterance, a click, that overflows the first layer of its model; the others do not."""
    folder = tmp_path_factory.mktemp("poisoned")
    manifest = write_speech(folder / "train", 24, seed=1, name="train")
    samples = np.random.default_rng(0).integers(-8, 9, 2 * RATE).astype(np.int16)
    samples[RATE] = 32_767
    soundfile.write(folder / "train" / "click.wav", samples, RATE, subtype="PCM_16")
    append_jsonl(manifest, {"audio_filepath": "click.wav", "text": "bill", "id": "click"})
    data = {
        "data.train": {"kind": "jsonl", "path": str(manifest)},
        "data.corpus_root": str(folder / "corpora"),
        "model.freeze_feature_encoder": True,
        "max_steps": 40,
        "seed": 3,
    }
    plain = recipe(folder / "run", **data)
    model = build_model(plain, prepare(plain, progress=False).vocabulary, say=lambda _: None)
    weights = {name: tensor.clone().contiguous() for name, tensor in model.hf.state_dict().items()}
    weights["wav2vec2.feature_extractor.conv_layers.0.conv.weight"] *= 2e18
    (folder / "weights").mkdir()
    save_file(weights, folder / "weights" / "model.safetensors")
    return {**data, "model.init_from": str(folder / "weights")}


def test_a_poison_utterance_is_named_and_a_person_cancels_and_takes_another_number_of_nodes(
    survivor, reference, poisoned
):
    whole = reference(**poisoned)
    skipped = [line for line in read_jsonl(whole.metrics) if line.get("event") == "skipped"]
    step = skipped[0]["step"]
    assert {name for line in skipped for name in line["ids"]} == {"click"}
    assert 3 < step < 20

    run = survivor(**poisoned, **{"limits.max_skipped_steps": 1})
    first = run.submit()
    verdict = run.verdict(1)
    assert (verdict["kind"], verdict["action"], verdict["step"]) == ("failed", "retry", step)
    verdict = run.verdict(2)
    assert (verdict["kind"], verdict["action"], verdict["utterances"]) == ("failed", "stop", ["click"])
    said = run.why()
    assert f"It failed so at step {step} in an earlier attempt already" in said
    assert "Look at the utterances of that step: click." in said
    assert f"It can go on from the checkpoint of step {step - 1}" in said
    run.until(lambda: not slurm_has(run))
    assert run.status()["state"] == "failed"
    refused = run.wavefleet("submit", run.recipe_file, "--cluster", run.profile, code=2)
    assert "--retry" in refused

    second = run.submit("--retry", "limits.max_skipped_steps=10")
    run.trains(attempt=3)
    run.cluster.reconfigure(KillWait="30")  # long enough to save on a busy machine
    run.cluster.run("scancel", second)
    verdict = run.verdict(3)
    run.cluster.reconfigure(KillWait=SETTINGS["KillWait"])
    assert (verdict["kind"], verdict["action"], verdict["num_lost_steps"]) == ("cancelled", "stop", 0)
    assert "The job was cancelled. Only `wavefleet retry` goes on with it" in run.why()
    run.until(lambda: not slurm_has(run))
    assert run.reconcile() == ["nothing"]

    run.wavefleet("retry", run.path, "--nodes", "1")
    run.ends_as(whole, relative=1e-4)
    started = [line for line in read_jsonl(run.run.metrics) if line.get("event") in ("started", "restored")]
    assert [line["world_size"] for line in started] == [2, 2, 2, 1]
    assert len({first, second, run.status()["job_id"]}) == 3


def test_successors_and_a_job_that_died_with_all_its_agents(profile, recipe, expected, tmp_path):
    """Where a job cannot be put back; and where Slurm has an accounting, which remembers jobs that squeue forgets."""
    with SlurmCluster(accounting=True, MinJobAge="2") as cluster:
        run = Survivor(cluster, profile, recipe(tmp_path / "runs" / "run"))
        first = run.submit("cluster.continuation=successor")
        run.trains(attempt=1)
        run.signal_agents(signal.SIGUSR2)
        assert run.verdict(1)["kind"] == "time_limit"
        run.trains(attempt=2)
        second = run.status()["job_id"]
        assert int(second) > int(first)
        assert run.resumed_from(2) == run.lines("stopped")[0]["step"]

        run.kill_all(second)
        run.until(lambda: second not in cluster.jobs())
        assert len(run.verdicts()) == 1
        said = run.why()
        assert "without a word from any rank; Slurm says FAILED" in said
        assert run.reconcile() == ["submit"]
        assert run.why() == said
        assert run.reconcile("--act") == ["submit"]
        run.ends_as(expected)
        assert [line["kind"] for line in run.verdicts()] == ["time_limit", "unknown", "done"]
        assert len(list(run.path.glob("jobs/*.json"))) == 3


def test_without_submit(slurm, recipe, expected, tmp_path):
    """`salloc wavefleet train`, and the batch script for sites without submitit, which goes on in the same job."""
    short = Survivor(slurm, None, recipe(tmp_path / "short", max_steps=6))
    environ = {**slurm.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    train = [*WAVEFLEET, "train"]
    done = subprocess.run(
        ["salloc", "--nodes=2", *train, short.recipe_file], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = losses(short.run)
    assert_close(made, {step: losses(expected)[step] for step in range(1, 7)})
    assert short.hosts() and len(short.hosts()) == 2

    run = Survivor(slurm, None, recipe(tmp_path / "run"))
    path = f"{Path(sys.executable).parent}:{slurm.environ['PATH']}"
    variables = f"PATH={path},PYTHONPATH={Path.cwd()},OMP_NUM_THREADS=1"
    job = slurm.submit(
        "--gpus-per-node=0", "--cpus-per-task=1", "--time=30",
        f"--export=ALL,{variables}", f"{Path.cwd()}/slurm/train.sbatch", str(run.recipe_file),
    )  # fmt: skip
    run.trains(attempt=1)
    slurm.run("scancel", "--signal=USR2", job)
    assert run.verdict(1)["kind"] == "time_limit"
    run.ends_as(expected)
    assert run.resumed_from(2) == run.lines("stopped")[0]["step"]
    slurm.wait_for(job, "COMPLETED", restarts=1)
