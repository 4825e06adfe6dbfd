import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from asr_train import lock as lock_module
from asr_train.lock import HeartbeatLock, LockHeldError, holder


def test_a_live_holder_keeps_others_out_and_is_named(tmp_path):
    path = tmp_path / "lock.json"
    with HeartbeatLock(path):
        with pytest.raises(LockHeldError) as caught, HeartbeatLock(path):
            pass
        assert caught.value.holder["pid"] == os.getpid()
        assert caught.value.holder["host"] == os.uname().nodename
        assert path.exists()  # the refused one has not removed it
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_killed_by_sigkill_holds_nothing(tmp_path):
    path = tmp_path / "lock.json"
    code = (
        "import sys, time; from pathlib import Path; from asr_train.lock import HeartbeatLock\n"
        "HeartbeatLock(Path(sys.argv[1])).__enter__(); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(LockHeldError), HeartbeatLock(path):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert holder(path) is None
    with HeartbeatLock(path):
        assert holder(path)["pid"] == os.getpid()


def test_a_holder_on_another_host_lives_by_its_heartbeat(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    monkeypatch.setattr(lock_module.socket, "gethostname", lambda: "node7")
    lock = HeartbeatLock(path)
    lock.__enter__()
    monkeypatch.undo()
    assert holder(path)["host"] == "node7"
    old = time.time() - lock_module.STALE_S - 1
    os.utime(path, (old, old))
    assert holder(path) is None


def test_many_that_try_to_take_over_a_dead_lock_end_with_one_holder(tmp_path):
    path = tmp_path / "lock.json"
    dead = {
        "host": os.uname().nodename,
        "pid": 999999,
        "process_start": 0,
        "pid_space": lock_module._pid_space(),
        "token": "x",
    }
    path.write_text(json.dumps(dead))
    code = (
        "import sys, time; from pathlib import Path; from asr_train.lock import HeartbeatLock, LockHeldError\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n    HeartbeatLock(Path(sys.argv[1])).__enter__(); print('held', flush=True); sys.stdin.read()\n"
        "except LockHeldError: print('refused', flush=True)"
    )
    start = str(time.time() + 1.5)
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(path), start], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(6)
    ]
    said = [child.stdout.readline().decode().strip() for child in children]
    for child in children:
        child.stdin.close()
        child.wait()
    assert sorted(said) == ["held"] + ["refused"] * 5


def test_a_holder_that_lets_go_while_it_is_looked_at_is_named_or_nobody(tmp_path, monkeypatch):
    """Never somebody without a name, for whom another would wait and say so."""
    path = tmp_path / "lock.json"
    create_time = psutil.Process.create_time

    def gone_meanwhile(process):
        path.unlink(missing_ok=True)
        return create_time(process)

    with HeartbeatLock(path):
        monkeypatch.setattr(psutil.Process, "create_time", gone_meanwhile)
        assert holder(path)["pid"] == os.getpid()
        assert holder(path) is None
