"""The memory benchmark counts what autograd keeps, and says how far the prediction is off."""

import json

import pytest
import torch
from test_benchmarks import load, run

memory = load("memory")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "memory.json"
    done = run("memory.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_each_saved_storage_is_counted_once_and_parameters_are_not():
    model = torch.nn.Linear(10, 10)
    inputs = torch.randn(7, 10, requires_grad=True)
    with memory.count_saved(model) as counted:
        hidden = model(inputs)  # keeps its input and its weight
        (hidden * hidden).sum()  # keeps hidden, twice
    assert counted.bytes == 4 * (7 * 10 + 7 * 10)


def test_every_case_is_run_and_the_bars_are_over_the_real_models(smoke):
    result, text = smoke
    kinds = {(row["model"], row["checkpointing"], row["frozen"], row["precision"]) for row in result["rows"]}
    for name in memory.JUDGED:
        for checkpointing in (True, False):
            for frozen in (True, False):
                for precision in ("fp32", "bf16"):
                    assert (name, checkpointing, frozen, precision) in kinds
    assert all(row["measured"] > 0 for row in result["rows"])
    assert len(result["bars"]) == 4
    assert "Tiny models." in text


def test_checkpointing_is_seen_to_keep_less(smoke):
    rows = {tuple(value for key, value in row.items() if key not in ("predicted", "measured")): row["measured"]
            for row in smoke[0]["rows"]}  # fmt: skip
    for (name, checkpointing, *rest), measured in rows.items():
        if checkpointing:
            assert measured < rows[(name, False, *rest)]
