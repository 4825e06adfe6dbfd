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


def run(*arguments):
    command = [sys.executable, BENCHMARKS / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A small run: its result and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "prepare.json"
    done = run("--files", NUM_FILES, "--repeat", REPEAT, "--rounds", 1, "--out", out)
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
    committed = json.loads((BENCHMARKS / "results" / "prepare.json").read_text(encoding="utf-8"))
    assert keys(committed) == keys(smoke[0])
    spec = importlib.util.spec_from_file_location("benchmark_prepare", BENCHMARKS / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert module.render(committed) in (BENCHMARKS / "README.md").read_text(encoding="utf-8")


def test_a_folder_without_recordings_is_one_clear_message(tmp_path):
    done = run("--prompts", tmp_path / "nothing", "--out", tmp_path / "out.json")
    assert done.returncode != 0
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()
