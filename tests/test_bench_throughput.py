"""`benchmarks/throughput.py`: all variants train on the same utterances, and what is counted is what was trained on."""

import json
import os
import sys
import time
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench import check_committed, load, run
from transformers import Wav2Vec2FeatureExtractor

from asr_train.data.text import Vocabulary
from asr_train.errors import WavefleetError
from asr_train.model_config import build_processor


@pytest.fixture(scope="module")
def throughput():
    return load("throughput")


@pytest.fixture(scope="module")
def variants(throughput):
    import throughput_variants  # noqa: PLC0415 - `throughput` has loaded it

    return throughput_variants


def test_throughput_trains_every_variant_on_the_same_speech(throughput, tmp_path):
    out = tmp_path / "throughput.json"
    done = run("throughput.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["guide", "tuned", "accelerate", "ours", "bare"]
    assert len({(row["utterances"], row["audio_s"]) for row in rows.values()}) == 1
    assert [row["steps"] for row in rows.values()] == [1, 1, 1, 3, 3], "ours and the bare loop three times each"
    for row in rows.values():
        assert row["audio_s_per_s"]["median"] > 0
        assert 0 <= row["padding"] < 0.7
    assert rows["bare"]["data_wait"] == 0
    assert all(rows[variant]["data_wait"] > 0 for variant in ("guide", "accelerate"))
    assert rows["ours"]["ours_to_this"]["median"] == 1
    assert [row["variant"] for row in result["starting"]] == ["guide", "tuned", "accelerate", "ours"]
    assert all(row["utterances"] == 80 for row in result["starting"])
    assert list(tmp_path.iterdir()) == [out], "nothing is left behind"
    check_committed("throughput", result)


def test_both_collators_make_the_same_batch(variants):
    random = np.random.default_rng(0)
    values = [random.standard_normal(length).astype(np.float32) for length in (700, 400, 900)]
    labels = [[3, 4], [5], [6, 7, 8]]
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    guide = variants._Pads(build_processor(Vocabulary.build(["abc def"]), extractor))
    theirs = guide([{"input_values": [v.tolist()], "labels": one} for v, one in zip(values, labels, strict=True)])
    expert = variants._PadsArrays(with_mask=True)
    tuned = expert([{"input_values": v, "labels": np.array(one)} for v, one in zip(values, labels, strict=True)])
    assert set(theirs) == set(tuned)
    for name, tensor in tuned.items():
        assert torch.equal(theirs[name].to(tensor.dtype), tensor), name


def test_what_goes_into_the_model_is_counted_without_its_padding(variants, monkeypatch):
    monkeypatch.setattr(variants.Wav2Vec2FeatureEncoder, "forward", lambda encoder, values: values)
    monkeypatch.setattr(variants._BaseDataLoaderIter, "__next__", variants._BaseDataLoaderIter.__next__)
    monkeypatch.setattr(variants.psutil, "Process", lambda: SimpleNamespace(children=list))  # none to suspend
    here, there = Pipe()
    baton = variants.Baton(here, begin_s=0.0)
    values = torch.ones(2, 10)
    values[0, 7:] = 0.0  # padding
    values[1, 3] = 0.0  # silence
    there.send(2)  # steps of the next turn
    variants.Wav2Vec2FeatureEncoder.forward(None, values)
    baton.step_done()
    first = there.recv()
    assert (first.steps, first.samples, first.padded_samples) == (1, 17, 20)
    baton.step_done()
    there.send(1)
    variants.Wav2Vec2FeatureEncoder.forward(None, values[:1])
    baton.step_done()
    second = there.recv()
    assert (second.steps, second.samples, second.padded_samples) == (2, 7, 10)


def test_a_turn_is_as_long_as_its_slowest_rank(throughput, variants):
    rate = 16_000
    slices = [
        variants.Slice(10.0, 14.0, 2, 6 * rate, 8 * rate, 0.5, 4.0, 100),
        variants.Slice(10.5, 15.0, 2, 4 * rate, 4 * rate, 1.0, 4.0, 200),
    ]
    turn = throughput.Turn.of(slices)
    assert (turn.seconds, turn.audio_s_per_s, turn.steps) == (5.0, 2.0, 2)
    assert turn.audio_s_per_cpu_s == 10 / 8
    assert (turn.audio_s, turn.padded_audio_s, turn.data_wait, turn.rank_bytes) == (10.0, 12.0, 0.2, 200)


def test_a_ratio_is_that_of_neighbours_in_time(throughput):
    def turns(*rates):
        return [SimpleNamespace(audio_s_per_s=rate) for rate in rates]

    ours = turns(10.0, 12.0, 50.0, 20.0, 30.0, 1.0)
    assert throughput.ratios(ours, turns(6.0, 10.0)) == [2.0, 2.0], "the medians of three, beside one"
    assert throughput.ratios(ours, turns(10.0, 6.0, 25.0, 40.0, 30.0, 2.0)) == [1.0, 2.0, 2.0, 0.5, 1.0, 0.5]


def test_contestants_take_turns_forth_and_back_and_close_ones_three_a_round(throughput):
    order = []

    class Contestant:
        def __init__(self, name):
            self.name = name

        def train(self, steps):
            order.append((self.name, steps))
            return len(order)

    found = {name: Contestant(name) for name in "abc"}
    turns = sys.modules["throughput_arena"].by_turns(found, 2, {"a": 5, "b": 6, "c": 7}, close=("b", "c"))
    once = "abccbbc"
    assert "".join(name for name, _ in order) == once + once[::-1]
    assert set(order) == {("a", 5), ("b", 6), ("c", 7)}
    assert {name: len(each) for name, each in turns.items()} == {"a": 2, "b": 6, "c": 6}


def test_a_contestant_that_fails_or_makes_no_step_is_an_error_not_a_wait(throughput, variants, monkeypatch):
    arena = sys.modules["throughput_arena"]
    task = SimpleNamespace(world_size=2)

    def fails_on_one_rank(task, baton):
        if os.environ["RANK"] == "1":
            raise ValueError("no more utterances")
        time.sleep(60)

    monkeypatch.setattr(variants.psutil, "Process", lambda *pid: SimpleNamespace(children=lambda **_: []))
    monkeypatch.setitem(variants.VARIANTS, "fails", variants.Variant("the one that fails", fails_on_one_rank))
    monkeypatch.setitem(variants.VARIANTS, "sleeps", variants.Variant("the sleeper", lambda *_: time.sleep(60)))
    with pytest.raises(WavefleetError, match=r"the one that fails failed:(\n|.)*no more utterances"):
        arena.Contestant("fails", task)
    monkeypatch.setattr(arena, "_MAX_TURN_S", 0.2)
    with pytest.raises(WavefleetError, match=r"the sleeper failed:\nno step for 0\.2 s"):
        arena.Contestant("sleeps", task)


def test_the_bare_loop_keeps_each_step_that_has_work_for_all_ranks(variants):
    units = [4, 4, 3, 1]
    plan = SimpleNamespace(steps_per_epoch=4, num_units_in=lambda epoch, step: units[step])
    assert variants._full_steps(plan, 1) == [0, 1, 2, 3]
    assert variants._full_steps(plan, 2) == [0, 1, 2]
    with pytest.raises(WavefleetError, match="each of 5 ranks"):
        variants._full_steps(plan, 5)


def test_bars_are_judged_at_each_number_of_processes(throughput):
    row = {"set": "s", "model": "tiny", "ranks": 2, "data_wait": 0.0101}
    ratios = {"guide": 1.49, "tuned": 1.3, "bare": 0.94, "accelerate": 0.1, "ours": 1.0}
    rows = [{**row, "variant": variant, "ours_to_this": {"median": ratio}} for variant, ratio in ratios.items()]
    seconds = {"guide": 10.0, "tuned": 4.9, "ours": 5.0}
    starting = [{"variant": variant, "seconds": {"median": each}} for variant, each in seconds.items()]
    found = throughput.bars({"rows": rows, "starting": starting})
    assert [bar["met"] for bar in found] == [False, True, False, False, True, False]
    assert "2 processes" in found[0]["bar"]
