"""Three processes with data workers through `accelerate launch`: stopped, gone on with, and still the same run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_runs import (  # noqa: F401  recipe is a fixture
    NOTHING_EVALUATED,
    assert_close,
    assert_same_bits,
    first_line,
    losses,
    recipe,
    run_on,
    trained_ids,
    weights,
)

from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir

CONFIG = Path(__file__).parent.parent / "accelerate_configs" / "cpu.yaml"
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(recipe, tmp_path):  # noqa: F811
    path = tmp_path / f"{Path(recipe.run_dir).name}.yaml"
    path.write_text(dump_recipe(recipe))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", "3",
        "-m", "asr_train", str(path),
    ]  # fmt: skip
    return subprocess.Popen(command, env=ENVIRON, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, run, step):
    until = time.monotonic() + 200
    while max(losses(run), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


def statuses(run):
    return {rank: found["status"] for rank, found in run.outcomes().items()}


def test_3_processes_with_data_workers_stopped_and_resumed_make_the_same_run(recipe, tmp_path):  # noqa: F811
    """Stopped by SIGTERM to the launcher alone; then bit-equal to an uninterrupted run of as many processes.

    Three, for over two ranks sums are added in any order, and DDP chooses one anew in each attempt unless told not to.
    """
    changes = {**NOTHING_EVALUATED, "max_steps": 30, "units_per_step": 3, "unit_audio_s": 2}
    one, three = (run_on(size, recipe(f"on{size}", changes)) for size in (1, 3))
    launched = recipe("launched", {**changes, "num_workers": 1})
    run = RunDir(Path(launched.run_dir))

    process = launch(launched, tmp_path)
    wait_for_step(process, run, 6)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert statuses(run) == dict.fromkeys(range(3), "stopped"), errors
    stopped_at = max(losses(run))

    run_on(3, launched)
    assert [first_line(run, attempt)["step"] for attempt in (1, 2)] == [0, stopped_at]
    assert first_line(run)["world_size"] == 3
    assert_close(losses(run), losses(one))
    assert trained_ids(run) == trained_ids(one)
    assert losses(run) == losses(three)
    assert_same_bits(weights(run), weights(three))
