"""`wavefleet checkpoints RUN` on what a real training wrote."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from damage import flip_bit, truncate
from ranks import RankError, run_ranks
from small_run import recipe  # noqa: F401  a fixture

from asr_train import checkpoints, loop
from asr_train.run_dir import RunDir
from asr_train.train import train
from launch import cli


@pytest.fixture
def run(recipe):  # noqa: F811
    """A finished run with checkpoints of steps 2, 4 and 6, all evaluated."""
    done = recipe("run", max_steps=6, checkpoint__every="2", checkpoint__keep_last=9, eval__every="2")
    assert run_ranks(1, train, done) == [0]
    return RunDir(Path(done.run_dir))


def listed(run, capsys, *flags):
    """Exit code, and name -> row."""
    code = cli.main(["checkpoints", str(run.path), "--json", *flags])
    content = json.loads(capsys.readouterr().out)
    return code, {row["name"]: row for row in content["checkpoints"]}, content["quarantined"]


def shard(checkpoint):
    return next((checkpoint / "shards").glob("*.distcp"))


def test_it_lists_step_size_wer_and_which_is_resumed(run, capsys):
    code, rows, quarantined = listed(run, capsys, "--verify")
    assert code == 0
    assert [row["step"] for row in rows.values()] == [2, 4, 6]
    assert [row["resumed_next"] for row in rows.values()] == [False, False, True]
    assert all(row["whole"] and row["verified"] for row in rows.values())
    for name, row in rows.items():
        files = [
            path for path in (run.checkpoints / name).rglob("*") if path.is_file() and path.name != "MANIFEST.json"
        ]
        assert row["size_bytes"] == sum(path.stat().st_size for path in files)
        assert row["wer"].keys() == {"dev"}
        assert (row["strategy"], row["world_size"]) == ("ddp", 1)
    assert quarantined == []
    assert cli.main(["checkpoints", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "-> step-0000000006" in " ".join(out.split())
    assert "dev 100.00 %" in out


def test_damage_is_named_by_file_sizes_at_once_bits_with_verify(run, capsys):
    truncate(shard(run.checkpoints / "step-0000000006"))
    flip_bit(shard(run.checkpoints / "step-0000000004"))
    code, rows, _ = listed(run, capsys)
    assert code == 0
    assert rows["step-0000000004"]["resumed_next"]
    assert "bytes, and" in rows["step-0000000006"]["problem"]
    code, rows, _ = listed(run, capsys, "--verify")
    assert code == 0
    assert "is not what was written" in rows["step-0000000004"]["problem"]
    assert rows["step-0000000002"]["resumed_next"]
    for name in ("step-0000000002", "step-0000000004"):
        shutil.rmtree(run.checkpoints / name)
    code, rows, _ = listed(run, capsys)
    assert code == 5
    assert not rows["step-0000000006"]["resumed_next"]


def test_what_was_set_aside_is_listed_with_its_reason(run, capsys):
    broken = checkpoints.open_checkpoint(run.checkpoints / "step-0000000006")
    checkpoints.quarantine(broken, "a test did it")
    code, rows, quarantined = listed(run, capsys)
    assert code == 0
    assert list(rows) == ["step-0000000002", "step-0000000004"]
    assert [entry["reason"] for entry in quarantined] == ["a test did it"]
    assert cli.main(["checkpoints", str(run.path)]) == 0
    assert "a test did it" in capsys.readouterr().out


def test_the_one_that_attempts_fail_from_is_not_what_is_resumed(run, capsys):
    shutil.rmtree(run.checkpoints / "step-0000000006")
    run.done.unlink()

    def failing(error):
        def forward(*_):
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

        loop._forward = forward
        return train(run.recipe())

    for _ in range(4):  # ended from outside: never counts
        with pytest.raises(RankError):
            run_ranks(1, failing, None)
    assert listed(run, capsys)[1]["step-0000000004"]["resumed_next"]
    for _ in range(3):
        with pytest.raises(RankError, match="no memory"):
            run_ranks(1, failing, MemoryError("no memory"))
    assert listed(run, capsys)[1]["step-0000000002"]["resumed_next"]


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["checkpoints", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
