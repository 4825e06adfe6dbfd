"""`benchmarks/gpu.py` without a GPU: every part runs, with a tiny model, nothing is judged; and the computed limits."""

import json
from pathlib import Path

import pytest
from test_benchmarks import check_committed, load, run

PERFORMANCE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


@pytest.fixture(scope="module")
def gpu():
    return load("gpu")


def test_every_part_runs_without_a_gpu_and_its_bars_stay_open(tmp_path):
    out = tmp_path / "gpu.json"
    done = run("gpu.py", "--smoke", "--out", out, "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["device"], result["smoke"]) == (None, True)
    assert list(tmp_path.iterdir()) == [out]
    for name, part in result["parts"].items():
        for row in part["rows"]:
            assert row["failed"] == ("ModelError: cuDNN does not take this" if row.get("backend") == "cudnn" else None)
            assert row.get("audio_s_per_s", 1), name
    plain, compiled = result["parts"]["compile"]["rows"]
    assert compiled["compile"]
    assert compiled["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-2)
    assert compiled["steps_seen"] + compiled["steps_unseen"] == 2
    assert [bar["met"] for bar in result["bars"]] == [None] * 3
    assert done.stdout.count(": open") == 3
    check_committed("gpu", result)


def test_a_part_that_is_measured_later_joins_those_that_were(gpu, tmp_path, monkeypatch, capsys):
    """And one that fails says why, in its row."""
    failed = {"shape": "base", "precision": "bf16", "checkpointing": False, "failed": "OutOfMemoryError: | no more"}
    monkeypatch.setitem(gpu.PARTS, "models", lambda bench: [failed])
    monkeypatch.setitem(gpu.PARTS, "ctc", lambda bench: [])
    monkeypatch.setattr(gpu, "Bench", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "_in_a_process", lambda function: {"value": None})
    out = tmp_path / "gpu.json"
    for part in ("models", "ctc"):
        assert gpu.main(["--part", part, "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert parts["models"]["rows"] == [failed]
    assert parts["ctc"]["rows"] == []
    assert parts["trainer"] is None
    assert "OutOfMemoryError: / no more" in capsys.readouterr().out


def test_bars_are_judged_on_the_gpu_that_they_are_for_and_nowhere_else(gpu):
    def result(device, base, ours):
        models = [
            {"shape": shape, "audio_s_per_s": rate, "failed": None} for shape, rate in (("base", base), ("large", 1.0))
        ]
        rates = {"ours, the guide's batch": ours, "Trainer, the guide as written": 100.0}
        ways = [{"way": way, "audio_s_per_s": {"median": rate}} for way, rate in rates.items()]
        parts = {"models": {"rows": models}, "trainer": {"rows": ways}}
        return {"smoke": False, "device": device, "parts": parts}

    h200 = {"name": "NVIDIA H200"}
    assert [bar["met"] for bar in gpu.bars(result(h200, 10_000.0, 200.0))] == [True, False, True]
    assert [bar["met"] for bar in gpu.bars(result(h200, 9_999.0, 199.0))] == [False, False, False]
    assert [bar["met"] for bar in gpu.bars(result({"name": "NVIDIA A100"}, 1e6, 1e6))] == [None] * 3
    assert [bar["met"] for bar in gpu.bars(result(None, 1e6, 1e6))] == [None] * 3


def test_busy_time_counts_kernels_that_overlap_once(gpu):
    assert gpu.sides.busy_us([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7


def test_the_documented_limits_are_those_of_the_flop_count():
    limits = load("limits")
    assert limits.limits_table() in PERFORMANCE.read_text(encoding="utf-8")
    base = limits.rows()[0]
    assert base["gigaflops"] == pytest.approx(36, rel=0.01)  # computed by hand before the module was written
    assert base["limits"]["A100"] == pytest.approx(312_000 / 36, rel=0.01)
    assert base["expected_share"] == pytest.approx(10_000 * 36 / 788_000, rel=0.01)


def test_the_documented_parts_of_a_step_are_those_of_the_flop_count():
    limits = load("limits")
    assert limits.parts_table() in PERFORMANCE.read_text(encoding="utf-8")
    shares = limits.parts(limits._configs()["base"])
    assert sum(shares.values()) == pytest.approx(1)
    feed_forward = 3 * 12 * 2 * 2 * 768 * 3072 * 50  # layers, two products, a multiplication and an addition, frames
    assert shares["feed-forward"] == pytest.approx(feed_forward / 36e9, rel=0.01)
    scores = 3 * 12 * 2 * 2 * 768 * (14.8 * 50) * 50
    assert shares["attention's scores"] == pytest.approx(scores / 36e9, rel=0.01)


def test_the_documented_units_fit_and_more_memory_or_checkpointing_takes_no_smaller_ones():
    limits = load("limits")
    assert limits.units_table() in PERFORMANCE.read_text(encoding="utf-8")
    for name, parameters in (("xls-r-1b", 0.96e9), ("xls-r-2b", 2.16e9)):
        plain, checkpointed = (
            limits.largest_units(limits._configs()[name], gradient_checkpointing=is_on) for is_on in (False, True)
        )
        for found in (plain, checkpointed):
            sizes = [unit_s or 0 for unit_s in found.values()]  # GPUs stand by their memory
            assert sizes == sorted(sizes)
        for gpu, memory_gb in limits.MEMORY_GB.items():
            assert (plain[gpu] or 0) <= (checkpointed[gpu] or 0)
            if 16 * parameters > 1e9 * memory_gb:  # weights, gradients and two moments in float32
                assert checkpointed[gpu] is None, (name, gpu)


def test_limits_says_what_it_is_and_takes_nothing():
    done = run("limits.py", "--help")
    assert (done.returncode, done.stdout.startswith("usage: benchmarks/limits.py")) == (0, True), done.stderr
    assert run("limits.py", "--rounds", "3").returncode == 2


def test_the_loss_that_is_timed_is_that_of_training(gpu, monkeypatch):
    """So that what is measured may decide which kernel training takes."""
    called, real = [], gpu.sides.ctc_losses
    monkeypatch.setattr(gpu.sides, "ctc_losses", lambda *args, **kwargs: called.append(kwargs) or real(*args, **kwargs))
    monkeypatch.setattr(gpu.sides, "fits_cudnn", lambda *_: True)
    for backend, kernel in (("native", "torch"), ("cudnn", "cudnn")):
        called.clear()
        assert gpu.sides.ctc_ms(backend, 2, 20, 5, repeats=1) > 0
        assert called == 4 * [{"backend": kernel}], "three to warm up, and one"
