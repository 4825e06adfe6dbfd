"""Benchmarks run, on few files, and say what they say they do; nothing here asserts a time."""

import json
import sys

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from bench import check_committed, load, run

from asr_train.data.demo import demo_rows
from asr_train.data.lengths import LengthIndex
from asr_train.data.plan import Plan, PlanSettings
from asr_train.geometry import SAMPLE_RATE

NUM_FILES, REPEAT = 6, 2


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A small run: its result and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "prepare.json"
    done = run("prepare.py", "--files", NUM_FILES, "--repeat", REPEAT, "--rounds", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


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
    done = run("startup.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    (trained,) = result["training"]["ways"]
    stages = {entry["stage"]: entry["seconds"]["median"] for entry in result["training"]["stages"]}
    assert {"import torch", "model: built", "first step"} <= stages.keys()
    assert all(seconds > 0 for seconds in stages.values())
    assert trained["first_step_s"]["median"] > stages["first step"]
    assert all(len(timed[measure]["runs"]) == 1 for timed in result["commands"].values() for measure in timed)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[: 1 + len(result["commands"])] == ["command", *result["commands"]]
    assert {"wavefleet --help", "wavefleet submit --dry-run"} <= set(rows)
    assert list(tmp_path.iterdir()) == [out]
    check_committed("startup", result)


# --- batching ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batching():
    return load("batching")


@pytest.fixture
def task(batching, tmp_path):
    """Half an hour in units of 50 s, 8 a step, for 4 ranks."""
    lengths = batching.length_set("long tail, 1-30 s", 2000)
    LengthIndex.build(lengths).save(tmp_path / "index")
    return batching.Task(lengths, tmp_path / "index", 50, 8, 4, 1.73e-4)


def test_batching_replays_every_variant_that_is_here_and_names_those_that_are_not(batching, tmp_path):
    out = tmp_path / "batching.json"
    done = run("batching.py", "--smoke", "--rounds", 1, "--limit", 20, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    here = {key for key, variant in batching.VARIANTS.items() if variant.is_here}
    assert {"plan", "hf_grouped", "hf_rebalance", "max_tokens"} <= here
    assert {row["variant"] for row in result["replays"]} == here
    absent = [batching.VARIANTS[key].name for key in batching.VARIANTS if key not in here]
    assert result["missing"] == absent
    assert ("not installed" in done.stderr) == ("so not run" in done.stdout) == bool(absent)
    for row in result["replays"]:
        assert row["steps"] >= 4
        assert 0.1 < row["share"] <= 1 - row["padding"] + 1e-9  # waiting comes on top of padding
        assert row["max_to_mean"] == 1 if row["ranks"] == 1 else row["max_to_mean"] > 1
    lengths = batching.length_set("LibriSpeech-like", result["replays"][0]["utterances"])
    settings = PlanSettings(
        unit_audio_s=200, unit_utterances=None, units_per_step=8, order="cost", quadratic=result["quadratic"]
    )
    statistics = Plan(LengthIndex.build(lengths), settings, 0).statistics()
    ours = [row for row in result["replays"] if row["variant"] == "plan" and row["set"] == "LibriSpeech-like"]
    for row in ours:
        assert row["padding"] == pytest.approx(statistics.padded_share)
        assert (row["shapes"], row["steps"]) == (statistics.num_shapes, statistics.num_steps)
    check_committed("batching", result)


@pytest.mark.parametrize("key", ["plan", "hf_grouped", "hf_rebalance", "max_tokens", "lhotse"])
def test_steps_hold_whole_units_of_different_utterances(batching, task, key):
    if not batching.VARIANTS[key].is_here:
        pytest.skip(f"{batching.VARIANTS[key].package} is not installed")
    steps = list(batching.VARIANTS[key].steps(task))
    ids = np.concatenate([step.ids for step in steps])
    assert len(set(ids.tolist())) == len(ids) <= 2000
    assert len(ids) > 0.75 * 2000  # all but a step that is not full
    for step in steps:
        assert step.sizes.sum() == len(step.ids)
        assert len(step.sizes) == 8 or (key == "plan" and len(step.sizes) == 7)
        longest = np.array([task.lengths[unit].max() for unit in np.split(step.ids, np.cumsum(step.sizes)[:-1])])
        assert step.padded_samples is None or (step.padded_samples >= longest).all()
        if key == "max_tokens":
            assert (step.sizes * longest <= 50 * SAMPLE_RATE).all()


def test_ranks_are_dealt_the_batches_that_accelerate_deals_them(batching, task):
    variants = sys.modules["batching_variants"]
    steps = list(variants.hf_grouped_steps(task))
    units = [unit.tolist() for step in steps for unit in np.split(step.ids, np.cumsum(step.sizes)[:-1])]
    for rank in range(4):
        dealt = list(BatchSamplerShard(variants.hf_grouped_batches(task), num_processes=4, process_index=rank))
        assert units[rank::4] == dealt[: len(units) // 4]


def test_share_and_spread_by_hand(batching, task):
    """Two units of one second and one of two seconds, on two ranks, without attention: 3 s and 1 s, or 4 of 6."""
    second = SAMPLE_RATE
    lengths = np.array([1, 1, 2, 1]) * second
    hand = batching.Task(lengths, task.index, 2, 3, 2, 0.0)
    sums = batching._Sums(hand)
    sums.add(batching.Step(np.array([0, 1, 2]), np.array([1, 1, 1])))
    found = sums.summary(plan_s=6e-6)
    assert found["share"] == pytest.approx(4 / 6)
    assert found["max_to_mean"] == pytest.approx(3 / 2)
    assert (found["padding"], found["shapes"], found["spread"], found["steps"]) == (0, 2, 0, 1)
    assert found["plan_us"] == pytest.approx(2)
    sums.add(batching.Step(np.array([2, 3]), np.array([2]), np.array([2 * second])))  # one rank has nothing
    found = sums.summary(plan_s=0)
    assert found["share"] == pytest.approx(7 / (6 + 8))
    assert found["padding"] == pytest.approx(1 - 7 / 8)
    assert found["spread"] == pytest.approx(np.std([4 / 3, 3 / 2]) / np.std([1, 1, 2, 1]))


def test_a_peer_that_takes_too_long_is_stopped_and_counted_as_far_as_it_came(batching, task, monkeypatch):
    def slow(task):
        yield batching.Step(np.array([0, 1]), np.array([1, 1]))
        while True:
            pass

    monkeypatch.setitem(batching.VARIANTS, "slow", batching.VARIANTS["lhotse"].__class__("slow", None, slow))
    assert batching.replay("slow", task, 0.3)["steps"] == 1


def test_bars_are_judged_and_the_frontier_is_what_nothing_beats(batching):
    row = {"set": "s", "unit_audio_s": 200, "units_per_step": 512, "ranks": 512, "variant": "plan", "share": 0.9599}
    row |= {"padding": 0.0151, "shapes": 301, "spread": 0.31, "steps": 49}
    assert [bar["met"] for bar in batching.bars([row])] == [False] * 5
    row |= {"share": 0.96, "padding": 0.015, "shapes": 300, "spread": 0.3, "steps": 50}
    assert [bar["met"] for bar in batching.bars([row])] == [True] * 5
    best = {"share": 0.97, "padding": 0.01, "shapes": 200, "spread": 0.1}
    assert batching._beats(best, best | {"shapes": 201})
    assert not batching._beats(best, best | {"shapes": 201, "spread": 0.05})
    assert not batching._beats(best, dict(best))


# --- the plan's scale -------------------------------------------------------------------------------------------


def test_plan_scale_starts_ranks_and_says_what_there_is_no_room_for(tmp_path):
    out, size = tmp_path / "plan_scale.json", 30_000
    arguments = ("--sizes", size, 10**14, "--ranks", 512, "--rounds", 1, "--steps", 3, "--out", out)
    done = run("plan_scale.py", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    small, large = result["sizes"]
    assert "1200000.0 GB of disk" in large["not_run"]
    assert large["not_run"] in done.stdout
    assert small["built"]["index_bytes"] > 4 * size  # the order alone is an int32 each
    for place in small["starts"]["512"].values():
        for found in place.values():
            assert 5 < found["num_ids"] <= 200 / 1.3  # one unit of 200 s; no utterance is shorter
            assert 0 < found["grown_bytes"] < found["peak_bytes"] < 2**30
    assert all(len(found["runs"]) == 3 for found in small["step_ms"]["512"].values())
    check_committed("plan_scale", result)
