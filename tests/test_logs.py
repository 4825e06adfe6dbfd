"""`wavefleet logs`: a rank's and an attempt's output, the rank that failed first, following a live run."""

import os
import subprocess
import sys
import time

import pytest

from asr_train.files import append_jsonl, write_json
from asr_train.run_dir import RunDir
from launch import cli
from launch.ending.starts import Start
from launch.logs import _Life
from launch.verdict import Line, Verdict

LOST = "RuntimeError: [../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:5"
OWN = "ValueError: an own mistake"


@pytest.fixture
def run(tmp_path):
    """A run directory without any attempt."""
    found = RunDir(tmp_path / "run")
    write_json(found.path / "run.json", {"run_id": "0123456789ab", "name": "run"})
    return found


def wrote(run, start, rank, text, *, stream="stderr", per_node=2):
    """What a rank wrote, where torchrun puts it."""
    node, local_rank = divmod(rank, per_node)
    path = run.path / "logs" / start / f"node-{node}" / "run_x7" / "attempt_0" / str(local_rank) / f"{stream}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def agent_wrote(run, job, node, text, stream="err"):
    path = run.path / "slurm" / f"{job}_{node}_log.{stream}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def began(run, name, attempt=None, *, started=0.0, num_nodes=2, per_node=2):
    """A start with its agents, and the attempt that it made."""
    hosts = tuple(f"n{node + 1}" for node in range(num_nodes))
    start = Start(name=name, hosts=hosts, processes_per_node=per_node, time=started, job_id=name.partition(".")[0])
    start.write(run)
    for node in range(num_nodes):
        start.meeting(run, node).beat()
        os.utime(heart(run, name, node), (1, 1))  # it beats no more
    if attempt is not None:
        write_json(run.path / "attempts" / f"attempt-{attempt:03d}.json", {"attempt": attempt, "start": name})


def heart(run, name, node=0):
    return run.path / "agents" / name / f"node-{node}.json"


def ended(run, attempt, rank, message, *, at, lost_peer=False):
    outcome = {"status": "failed", "exit_code": 4, "message": message, "lost_peer": lost_peer, "time": at}
    write_json(run.path / "outcome" / f"attempt-{attempt:03d}" / f"rank-{rank}.json", outcome)


def logs(run, capsys, *arguments, code=0):
    assert cli.main(["logs", str(run.path), *arguments]) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def test_all_ranks_of_the_newest_attempt_each_line_with_its_rank(run, capsys):
    began(run, "7.0", 1, started=10)
    began(run, "7.1", 2, started=20)
    wrote(run, "7.0", 0, "old\n")
    for rank in range(4):
        wrote(run, "7.1", rank, f"said by {rank}\n")
    wrote(run, "7.1", 2, "printed\n", stream="stdout")
    assert logs(run, capsys).splitlines() == [
        "rank 0 | said by 0",
        "rank 1 | said by 1",
        "rank 2 | printed",
        "rank 2 | said by 2",
        "rank 3 | said by 3",
    ]


def test_one_rank_and_one_attempt_without_prefix(run, capsys):
    began(run, "9.0", 1, started=10)
    began(run, "10.0", 2, started=20)
    wrote(run, "9.0", 3, "three\n", per_node=2)
    wrote(run, "9.0", 0, "zero\n")
    assert logs(run, capsys, "--attempt", "1", "--rank", "3") == "three\n"


def test_a_newer_job_is_newer_whatever_its_number(run, capsys):
    """Slurm's job numbers begin anew at some sites."""
    began(run, "100.0", started=10)
    began(run, "7.0", started=20)
    wrote(run, "100.0", 0, "first\n")
    wrote(run, "7.0", 0, "second\n")
    assert logs(run, capsys) == "second\n"


def test_agents_add_what_ranks_did_not_write_themselves(run, capsys):
    began(run, "7.0", 1)
    agent_wrote(run, "7", 0, "--- 7.0 on n1 ---\nn1, node 0 of 2: python ...\n[default0]:said by 0\ntorchrun: failed\n")
    wrote(run, "7.0", 0, "said by 0\n")
    assert logs(run, capsys).splitlines() == [
        "node 0 | n1, node 0 of 2: python ...",
        "node 0 | torchrun: failed",
        "rank 0 | said by 0",
    ]


def test_a_single_process_writes_through_its_agent_one_start_after_the_other(run, capsys):
    """A job that is put back into the queue appends to its file."""
    for number in (1, 2):
        began(run, f"7.{number - 1}", number, started=number, num_nodes=1, per_node=1)
    first, second = "step 1\nstep 2\n", "step 3\n"
    agent_wrote(run, "7", 0, f"srun: starting\n--- 7.0 on n1 ---\n{first}--- 7.1 on n1 ---\n{second}")
    assert logs(run, capsys, "--attempt", "1") == first
    assert logs(run, capsys) == second
    assert logs(run, capsys, "--rank", "0") == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attempt", "3"], "has 1 attempts"),
        (["--rank", "5"], "there are ranks 0 to 1"),
    ],
)
def test_what_is_not_there_is_named(run, capsys, arguments, message):
    began(run, "7.0", 1)
    wrote(run, "7.0", 0, "a\n")
    wrote(run, "7.0", 1, "b\n")
    assert message in logs(run, capsys, *arguments, code=2)


def test_a_run_that_no_agent_started_says_so(run, capsys):
    assert "has no logs" in logs(run, capsys, code=2)
    write_json(run.path / "attempts" / "attempt-001.json", {"attempt": 1, "start": None})
    assert "wrote where it was started" in logs(run, capsys, "--attempt", "1", code=2)
    began(run, "local.1", num_nodes=1)
    assert "where `wavefleet train` was started" in logs(run, capsys, code=2)


def test_the_first_error_is_the_one_that_was_first_and_no_lost_peer(run, capsys):
    began(run, "7.0", 1)
    for rank, text in ((0, LOST), (1, LOST), (2, OWN), (3, "ValueError: a later one")):
        wrote(run, "7.0", rank, "step 1\n" + f"Traceback of {rank}\n" + f"{text}\n" + "an end\n")
    ended(run, 1, 0, LOST, at=100.0, lost_peer=True)
    ended(run, 1, 2, OWN, at=101.0)
    ended(run, 1, 3, "ValueError: a later one", at=102.0)
    said = logs(run, capsys, "--first-error")
    assert said.startswith(f"rank 2 on n2 failed first: {OWN}\n")
    assert "Traceback of 2" in said
    assert "Traceback of 3" not in said


def test_without_outcomes_the_logs_are_read_and_the_loudest_is_not_the_first(run, capsys):
    began(run, "7.0", 1)
    wrote(run, "7.0", 0, f"{LOST}\n" * 50)
    wrote(run, "7.0", 1, "x\n" * 100 + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB\n")
    said = logs(run, capsys, "--first-error")
    assert said.startswith("rank 1 on n1 failed first: torch.OutOfMemoryError")
    assert said.count("x\n") == 30


def test_an_error_that_no_rule_knows_is_found_where_only_one_rank_has_one(run, capsys):
    began(run, "7.0", 1)
    wrote(run, "7.0", 0, "all well\n")
    wrote(run, "7.0", 1, "KeyError: 'odd'\n")
    assert logs(run, capsys, "--first-error").startswith("rank 1 on n1 failed first: KeyError: 'odd'")


def test_after_a_hang_the_verdict_says_the_rank_and_its_stacks_are_shown(run, capsys):
    began(run, "7.0", 1)
    wrote(run, "7.0", 0, f"{OWN}\n")
    wrote(run, "7.0", 1, "step 4\n")
    (run.path / "hangs" / "7.0").mkdir(parents=True)
    (run.path / "hangs" / "7.0" / "rank-1.txt").write_text("rank 1 on n1: phase step at step 5; state T\n")
    hung = Verdict(kind="hang", rank=1, host="n1", evidence=(Line(text="hung in phase step at step 5"),))
    append_jsonl(run.path / "verdicts.jsonl", {"start": "7.0", "time": 50.0, **hung.to_json()})
    said = logs(run, capsys, "--first-error")
    assert said.startswith("rank 1 on n1 failed first: hung in phase step at step 5")
    assert "state T" in said
    assert "step 4" in said


def test_no_error_is_said(run, capsys):
    began(run, "7.0", 1)
    wrote(run, "7.0", 0, "all well\n")
    assert logs(run, capsys, "--first-error") == "no rank says that it failed\n"
    done = Verdict(kind="done", message="The run is done.")
    append_jsonl(run.path / "verdicts.jsonl", {"start": "7.0", "time": 50.0, **done.to_json()})
    assert logs(run, capsys, "--first-error") == "done: The run is done.\n"


def lines_of(process, number):
    return [process.stdout.readline().decode().rstrip("\n") for _line in range(number)]


def test_following_shows_what_comes_of_every_start_until_the_run_ends(run):
    began(run, "7.0", 1, started=10)
    os.utime(heart(run, "7.0"))
    wrote(run, "7.0", 0, "was there\nhalf a li")
    command = [sys.executable, "-m", "launch.cli", "logs", str(run.path), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert lines_of(process, 1) == ["was there"]
        wrote(run, "7.0", 0, "ne\n")
        assert lines_of(process, 1) == ["half a line"]
        wrote(run, "7.0", 1, "another file\n")
        assert lines_of(process, 1) == ["rank 1 | another file"]
        began(run, "7.1", 2, started=20)
        os.utime(heart(run, "7.1"))
        wrote(run, "7.1", 0, "again\n")
        assert lines_of(process, 2) == ["--- 7.1 ---", "again"]
        wrote(run, "7.1", 0, "the end, without a newline")
        (run.path / "agents" / "7.0" / "decided").touch()
        (run.path / "agents" / "7.1" / "decided").touch()
        assert lines_of(process, 2) == ["the end, without a newline", ""]
        assert process.wait(timeout=120) == 0


def test_following_one_rank_of_one_attempt_ends_with_it(run):
    began(run, "7.0", 1, started=10)
    began(run, "7.1", 2, started=20)
    later = time.time() + 3600  # the run itself does not end
    os.utime(heart(run, "7.1"), (later, later))
    wrote(run, "7.0", 0, "zero\n")
    wrote(run, "7.0", 1, "one\n")
    command = ["logs", str(run.path), "--follow", "--attempt", "1", "--rank", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "one\n"


@pytest.mark.parametrize(
    ("kind", "action", "wait_s", "is_over"),
    [("failed", "stop", 0.0, True), ("hang", "retry", 0.0, False), ("network", "retry", 600.0, False)],
)
def test_a_run_that_will_be_tried_again_is_not_over(run, kind, action, wait_s, is_over):
    """Between two starts nobody trains; the wait of a failure of the network may be long."""
    began(run, "local.1", 1, started=time.time() - 1000, num_nodes=1)
    assert not _Life(run).goes_on()
    judged = Verdict(kind=kind, action=action, wait_s=wait_s)
    ago_s = 500 if wait_s else 1
    append_jsonl(run.path / "verdicts.jsonl", {"start": "local.1", "time": time.time() - ago_s, **judged.to_json()})
    assert _Life(run).goes_on() is not is_over


def test_a_start_that_has_just_begun_is_not_over(run):
    began(run, "local.1", started=time.time(), num_nodes=1)
    assert _Life(run).goes_on()
