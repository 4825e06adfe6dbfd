"""Benchmarks run, on few files, and say what they say they do; nothing here asserts a time."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from asr_train.data.demo import demo_rows
from asr_train.geometry import SAMPLE_RATE

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NUM_FILES, REPEAT = 6, 2


def run(script, *arguments):
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_committed(name, smoke_result):
    """The result in the repository has the form of today's, and the README has its table."""
    committed = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert keys(committed) == keys(smoke_result)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(BENCHMARKS))  # as when it is run as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert module.render(committed) in (BENCHMARKS / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A small run: its result and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "prepare.json"
    done = run("prepare.py", "--files", NUM_FILES, "--repeat", REPEAT, "--rounds", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def keys(value):
    """The structure of a result: nested keys, without the values."""
    return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_both_sides_prepare_the_same_audio(smoke):
    result, _ = smoke
    spoken_s = REPEAT * sum(len(row.synthesise()) for row in demo_rows("train")[:NUM_FILES]) / SAMPLE_RATE
    assert (result["files"], result["rows"]) == (NUM_FILES, NUM_FILES * REPEAT)
    for form, summary in result["forms"].items():
        assert summary["guide"]["audio_s"] == summary["ours"]["audio_s"], form
        assert summary["ours"]["audio_s"] == pytest.approx(spoken_s, rel=0.05), form  # MP3 pads its ends


def test_bytes_are_those_of_float32_and_int16(smoke):
    result, _ = smoke
    for summary in result["forms"].values():
        num_samples = summary["ours"]["audio_s"] * SAMPLE_RATE
        for side, sample_bytes in (("guide", 4), ("ours", 2)):
            extra = summary[side]["bytes_on_disk"] - sample_bytes * num_samples
            assert 0 < extra < 60_000, side


def test_every_run_is_in_the_result_and_the_table_names_all_four(smoke):
    result, printed = smoke
    for summary in result["forms"].values():
        for side in ("guide", "ours"):
            for measure in ("audio_s_per_s", "audio_s_per_cpu_s"):
                assert len(summary[side][measure]["runs"]) == 1
                assert summary[side][measure]["median"] > 0
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in printed.splitlines() if line.startswith("| ")]
    forms, sides = ("WAV, 8 kHz", "MP3, 48 kHz"), ("the guide's map", "prepare")
    assert rows == [["from", "by"], *([form, side] for form in forms for side in sides)]


def test_the_committed_result_is_of_this_benchmark_and_its_table_is_in_the_readme(smoke):
    check_committed("prepare", smoke[0])


def test_a_folder_without_recordings_is_one_clear_message(tmp_path):
    done = run("prepare.py", "--prompts", tmp_path / "nothing", "--out", tmp_path / "out.json")
    assert done.returncode != 0
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_checkpoint_measures_every_way_to_save_and_to_find_the_place(tmp_path):
    out = tmp_path / "checkpoint.json"
    done = run("checkpoint.py", "--smoke", "--folder", tmp_path, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    alone = {"async", "sync", "torch", "accelerate", "trainer"}
    assert {number: set(found["ways"]) for number, found in result["saves"].items()} == {
        "1": alone,
        "2": alone - {"trainer"},
    }
    for found in result["saves"].values():
        assert 0 <= found["state_bytes"] - 12 * found["parameters"] < 1_000, "weights and two moments, float32"
        for way in found["ways"].values():
            assert len(way["blocked_s"]["runs"]) == len(way["safe_s"]["runs"]) == 1
    for found in result["resumes"].values():
        assert all(len(seconds["runs"]) == 1 for seconds in found["seconds"].values())
    assert list(tmp_path.iterdir()) == [out], "nothing is left behind"
    check_committed("checkpoint", result)


def test_faults_are_done_to_both_and_ours_loses_nothing(tmp_path):
    out = tmp_path / "faults.json"
    done = run("faults.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {entry["fault"]: (entry["ours"]["outcome"], entry["ours"]["from"]) for entry in result["faults"]} == {
        "resumed in mid-epoch": ("right", 7),
        "SIGKILL as a save begins; 1 kept": ("right", 5),
        "a flipped bit in the weights": ("previous one used, said", 5),
        "a pickle that is a program for the index, or the position": ("previous one used, said", 5),
        "a pickle that is a program for the random generators": ("refused, with a message", None),
    }
    (killed,) = (entry for entry in result["faults"] if "SIGKILL" in entry["fault"])
    assert [killed[side]["first"]["code"] for side in ("ours", "accelerate")] == [-9, -9]
    check_committed("faults", result)


def test_startup_starts_every_command_and_leaves_nothing(tmp_path):
    out = tmp_path / "startup.json"
    done = run("startup.py", "--rounds", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert all(len(timed[measure]["runs"]) == 1 for timed in result["commands"].values() for measure in timed)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["command", *result["commands"]]
    assert {"wavefleet --help", "wavefleet submit --dry-run"} <= set(rows)
    assert list(tmp_path.iterdir()) == [out]
    check_committed("startup", result)
