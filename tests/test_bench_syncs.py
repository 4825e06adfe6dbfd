"""Waits of the host are counted where they are, and nowhere else; ours makes one a step."""

import json
import sys

import numpy as np
import pytest
import torch
from test_benchmarks import check_committed, load, run

from asr_train.data.lengths import LengthIndex


@pytest.fixture(scope="module")
def counter_of():
    load("sync_counter")
    return sys.modules["benchmark_sync_counter"]


def counted(module, function, *values):
    """What a function of tensors on the device waits for."""
    counter = module.SyncCounter(is_gpu=False)
    with counter:
        on_device = [value.to(torch.device("cpu"), non_blocking=True) for value in values]
        counter.counts.clear()
        function(*on_device)
    return dict(counter.counts)


def test_the_self_test_counts_one_of_each_and_fails_for_a_counter_that_is_blind(counter_of, monkeypatch):
    kinds = counter_of.self_test(torch.device("cpu"))
    assert {"item", "tolist", "numpy", "cpu", "to the host", "truth value", "nonzero", "boolean indexing",
            "_local_scalar_dense"} <= kinds.keys()  # fmt: skip
    monkeypatch.delitem(counter_of._READS, "tolist")
    with pytest.raises(AssertionError, match="tolist"):
        counter_of.self_test(torch.device("cpu"))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: [float(x[0]), int(x[1]), x.sum().item()], {"item": 3}),
        (lambda x: x.masked_select(x > 0), {"boolean indexing": 1}),
        (lambda x: x.__setitem__(x > 0, x[:2] + 1), {"boolean indexing": 1}),
        (lambda x: x.__setitem__(x > 0, 0.0), {}),  # a fill
        (lambda x: torch.where(x > 0), {"nonzero": 1}),
        (lambda x: torch.where(x > 0, x, -x), {}),
        (lambda x: [1 for value in x if value > 0], {"truth value": 3}),
        (lambda x: torch.tensor([1.0], device=torch.device("cpu")), {"to the device": 1}),
        (lambda x: torch.zeros(1, device=torch.device("cpu")) + x, {}),
        (lambda x: torch.arange(3).to(x.device, non_blocking=True) + x, {}),
    ],
)
def test_what_waits_and_what_does_not(counter_of, call, expected):
    assert counted(counter_of, call, torch.tensor([1.0, -2.0, 3.0])) == expected


def test_gradients_of_what_is_on_the_device_are_on_it_and_the_hosts_are_not(counter_of):
    counter = counter_of.SyncCounter(is_gpu=False)
    with counter:
        device = torch.nn.Linear(2, 1).to(torch.device("cpu"))
        host = torch.nn.Linear(2, 1)
        counter.counts.clear()
        device(torch.ones(1, 2, device=torch.device("cpu"))).sum().backward()
        host(torch.ones(1, 2)).sum().backward()
        host.weight.grad.tolist()
        assert counter.counts == {}
        device.weight.grad.tolist()
    assert counter.counts == {"tolist": 1}


def test_ctcs_own_waits_are_told_apart(counter_of):
    counter = counter_of.SyncCounter(is_gpu=False)
    with counter:
        logits = torch.randn(5, 1, 4).to(torch.device("cpu"), non_blocking=True).requires_grad_()
        lengths = torch.tensor([5]), torch.tensor([2])
        torch.nn.functional.ctc_loss(logits.log_softmax(-1), torch.tensor([1, 2]), *lengths).backward()
    assert (dict(counter.counts), counter.kernel_waits) == ({}, 6)


def test_ours_waits_once_a_step_and_twice_in_fp16_whatever_the_number_of_units(tmp_path):
    out = tmp_path / "syncs.json"
    done = run("syncs.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {(row["side"], row["precision"]): row for row in result["rows"]}
    if not torch.cuda.is_available():
        assert rows["ours", "fp32"]["kinds"] == {"tolist": 1}
        assert rows["ours", "fp16"]["kinds"] == {"tolist": 1, "item": 1}  # the second is GradScaler's
    assert all(bar["met"] for bar in result["bars"])
    assert rows["guide", "fp32"]["syncs"] >= 4 * result["units_per_step"], "masks, losses, truth values, each batch"
    assert list(tmp_path.iterdir()) == [out]
    check_committed("syncs", result)


def test_unmasked_finds_nothing_with_the_mask_and_something_without(tmp_path):
    out = tmp_path / "unmasked.json"
    done = run("unmasked.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rounding, *rows = result["changes"]
    assert all(row["masked"] < 1e-5 < row["unmasked"] for row in rows)
    assert rounding["bf16"] > 1e-5
    for row in result["units"]:
        assert 0 <= row["unpadded"] <= row["units"]
        assert 0 < row["padded_share"] < 0.3
    check_committed("unmasked", result)


def test_units_of_one_length_that_shapes_have_are_not_padded(monkeypatch):
    unmasked = load("unmasked")
    rounded = int(LengthIndex.build(np.array([10 * 16_000])).lengths[0])
    monkeypatch.setattr(unmasked, "length_set", lambda name, count: np.full(count, rounded))
    found = unmasked.units("equal", unmasked.Wav2Vec2Config(), 8)
    assert (found["unpadded"], found["padded_share"]) == (found["units"], 0)
