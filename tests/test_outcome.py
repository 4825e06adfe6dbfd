"""From evidence to verdict: every rule, the combinations that mislead, and that no evidence can break it."""

import json
import random

import pytest

from launch.ending import signs
from launch.ending.outcome import judge
from launch.verdict import KINDS, Evidence, Hang, NodeReport, Policy, Verdict

GPU_OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"
PEER = "RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:41234"
PORT = "DistNetworkError: The server socket has failed to listen on port: 29500, code: -98, name: EADDRINUSE"
POISON = (
    "TrainingError: 10 steps in a row were not finite, the last one step 57 (loss of utt-13, utt-7); checkpoints before"
    " them are kept. Try a lower optim.lr"
)
TORCHRUN = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
[0]:
  time      : 2026-03-01_12:00:00
  host      : n2
  rank      : 3 (local_rank: 1)
  exitcode  : -9 (pid: 4242) SIGKILL
  error_file: <N/A>
"""


def failed(message, time=100.0, code=4, lost=False):
    return {"status": "failed", "exit_code": code, "message": message, "lost_peer": lost, "time": time, "host": "x"}


def lost(time=101.0):
    return failed(PEER, time, lost=True)


STOPPED = {"status": "stopped", "exit_code": 3, "step": 120, "message": "stopped", "time": 100.0}
DONE = {"status": "done", "exit_code": 0, "step": 500, "message": "done", "time": 100.0}


def evidence(ranks=None, nodes=None, **more):
    """Two nodes n1 and n2 of two ranks each; every rank that is not given lost its peer."""
    given = dict(ranks or {})
    reports = {"n1": NodeReport(ranks=(0, 1), exit_code=1), "n2": NodeReport(ranks=(2, 3), exit_code=1)}
    base = {"resumed_step": 100, "last_step": 120, "time": 1000.0}
    return Evidence(num_ranks=4, ranks=given, nodes=reports | (nodes or {}), **(base | more))


def peers(**causes):
    """Outcomes of four ranks: those given as rN, the others lost their peer."""
    return {rank: causes.get(f"r{rank}", lost()) for rank in range(4)}


def all_of(outcome):
    return dict.fromkeys(range(4), outcome)


def mute(*ranks):
    return {rank: lost() for rank in range(4) if rank not in ranks}


SILENT = {"n2": NodeReport(reported=False, ranks=(2, 3))}
REFUSED = {"n2": NodeReport(preflight="3 of 4 GPUs answer", ranks=(2, 3))}
XID = {"n2": NodeReport(hardware="NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus", ranks=(2, 3))}
SOFT_XID = {"n2": NodeReport(hardware="NVRM: Xid (PCI:0000:3b:00): 31, pid=77, MMU Fault", ranks=(2, 3))}
KILLED = {"n2": NodeReport(ranks=(2, 3), exit_code=1, tail=TORCHRUN)}
HANG = Hang(phase="step", step=120, rank=2, host="n2", state="T", time=90.0)

# name: evidence -> kind, action, exit code, budget used, what the message says
CASES = {
    "done": (evidence(all_of(DONE)), "done", "done", 0, False, "The run is done"),
    "done, and a rank failed when it ended": (evidence(peers(r0=DONE)), "done", "done", 0, False, "done"),
    "done before": (evidence({}, is_done=True), "done", "done", 0, False, "done"),
    "done, cancelled afterwards": (
        evidence(all_of(DONE), slurm_state="CANCELLED by 1000"), "done", "done", 0, False, "done"),
    "time limit with a commit": (
        evidence(all_of(STOPPED), stop_reason="time limit", committed_step=120),
        "time_limit", "continue", 3, False, "from the checkpoint of step 120"),
    "the recipe's time limit": (
        evidence(all_of({**STOPPED, "message": "stopped by limits.max_time_s"}), committed_step=120),
        "time_limit", "continue", 3, False, "time limit came"),
    "a job's warning signal": (
        evidence(all_of(STOPPED), stop_reason="SIGUSR2", slurm_state="RUNNING", committed_step=120),
        "time_limit", "continue", 3, False, "step 120"),
    "time limit without": (
        evidence({}, nodes={"n1": SILENT["n2"], "n2": SILENT["n2"]}, slurm_state="TIMEOUT"),
        "time_limit", "continue", 4, False, "from the checkpoint of step 100; 20 steps made since are lost"),
    "nothing ever saved": (
        evidence({}, slurm_state="TIMEOUT", resumed_step=None),
        "time_limit", "continue", 4, False, "nothing is saved yet; 120 steps made so far are lost"),
    "deadline": (evidence({}, slurm_state="DEADLINE"), "time_limit", "stop", 4, False, "deadline"),
    "time limit, and a rank had failed a second before": (
        evidence(peers(r2=failed("ValueError: shapes differ", 99.0)), slurm_state="TIMEOUT", stop_time=100.0),
        "failed", "retry", 4, True, "Rank 2 on n2 failed: ValueError: shapes differ"),
    "time limit, a rank failed because of it": (
        evidence(peers(r2=failed("RuntimeError: DataLoader worker is killed by signal: Terminated.", 101.0)),
                 slurm_state="TIMEOUT", stop_time=100.0),
        "time_limit", "continue", 4, False, "time limit"),
    "saved, then a rank failed while it ended": (
        evidence(all_of(STOPPED) | {1: failed("RuntimeError: tracker", 103.0)}, stop_reason="time limit",
                 stop_time=90.0, committed_step=120),
        "time_limit", "continue", 3, False, "step 120"),
    "time limit, and the disk was full": (
        evidence(peers(r0=failed("TrainingError: the checkpoint of step 120 could not be written to /runs: "
                                 "[Errno 28] No space left on device", 105.0)),
                 stop_reason="time limit", stop_time=100.0),
        "failed", "retry", 4, True, "No space left"),
    "preempted": (
        evidence(all_of(STOPPED), stop_reason="preempted", committed_step=120), "preempted", "continue", 3, False, ""),
    "preempted in mid-save": (
        evidence(peers(r0=failed("TrainingError: saving broke off: gone; checkpoints before are untouched", 101.0)),
                 slurm_state="PREEMPTED", stop_time=99.0),
        "preempted", "continue", 4, False, "20 steps made since are lost"),
    "user": (
        evidence(all_of(STOPPED), stop_reason="user", committed_step=120),
        "stopped_by_user", "stop", 3, False, "step 120"),
    "user, and the time limit came meanwhile": (
        evidence(all_of(STOPPED), stop_reason="control/stop", slurm_state="TIMEOUT", committed_step=120),
        "stopped_by_user", "stop", 3, False, "control/stop"),
    "Ctrl-C on one machine": (
        evidence(all_of({**STOPPED, "message": "stopped by SIGINT"}), committed_step=120),
        "stopped_by_user", "stop", 3, False, "wavefleet retry"),
    "user, and the save failed": (
        evidence(peers(r0=failed("TrainingError: [Errno 28] No space left on device", 105.0)), stop_reason="user",
                 stop_time=100.0),
        "failed", "stop", 4, True, "No space left"),
    "scancel": (
        evidence(mute(), slurm_state="CANCELLED by 1000", cancelled_by="ada"),
        "cancelled", "stop", 4, False, "cancelled by ada"),
    "scancel after a failure": (
        evidence(peers(r1=failed("ValueError: x")), slurm_state="CANCELLED"),
        "cancelled", "stop", 4, False, "before that, rank 1 on n1 failed: ValueError: x"),
    "node failure by Slurm": (
        evidence({0: lost(), 1: lost()}, nodes=SILENT, slurm_state="NODE_FAIL"),
        "node_failure", "continue", 4, False, "Lost node n2: Slurm: NODE_FAIL"),
    "Slurm ends the others with SIGTERM when a node fails": (
        evidence({0: {**STOPPED, "message": "stopped by SIGTERM"}, 1: lost()}, nodes=SILENT, slurm_state="NODE_FAIL",
                 stop_reason="SIGTERM"),
        "node_failure", "continue", 4, False, "n2"),
    "a node is down, and Slurm ended the other agent with the job": (
        evidence({}, nodes={"n1": NodeReport(reported=False, ranks=(0, 1)), **SILENT}, slurm_state="NODE_FAIL",
                 down_hosts=("n2",)),
        "node_failure", "continue", 4, False, "Lost node n2: Slurm: NODE_FAIL"),
    "agent killed, which takes the other along": (
        evidence(all_of({**STOPPED, "message": "stopped by SIGTERM"}), nodes=SILENT, committed_step=120,
                 stop_reason="SIGTERM", stop_time=100.0),
        "node_failure", "continue", 4, False, "Lost node n2: its agent said nothing at its end"),
    "node did not boot": (
        evidence({}, nodes=SILENT, slurm_state="BOOT_FAIL"), "node_failure", "continue", 4, False, ""),
    "silent agent": (
        evidence({0: lost(), 1: lost()}, nodes=SILENT), "node_failure", "continue", 4, False, "said nothing"),
    "agent killed, its ranks saved and stopped": (
        evidence(all_of({**STOPPED, "message": "stopped by SIGTERM"}), nodes=SILENT, committed_step=120),
        "node_failure", "continue", 4, False, "n2"),
    "node lost, and then the time limit": (
        evidence({0: lost(50.0), 1: lost(50.0)}, nodes=SILENT, slurm_state="TIMEOUT", stop_time=100.0),
        "node_failure", "continue", 4, False, "n2"),
    "node failure while the time limit came": (
        evidence({0: lost(150.0)}, nodes=SILENT, slurm_state="NODE_FAIL", stop_reason="time limit", stop_time=100.0),
        "node_failure", "continue", 4, False, "n2"),
    "preflight": (evidence({}, nodes=REFUSED), "preflight", "continue", 4, False, "failed on n2: 3 of 4 GPUs answer"),
    "preflight everywhere": (
        evidence({}, nodes={"n1": REFUSED["n2"], "n2": REFUSED["n2"]}), "preflight", "stop", 4, False, "on all nodes"),
    "Xid": (
        evidence(peers(r3=failed("AcceleratorError: CUDA error: unspecified launch failure")), nodes=XID),
        "hardware", "continue", 4, False, "n2: NVRM: Xid"),
    "Xid, and its rank took it for want of memory": (
        evidence(peers(r3=failed(GPU_OOM)), nodes=XID), "hardware", "continue", 4, False, "n2: NVRM: Xid"),
    "Xid of the program's own doing": (
        evidence(peers(r3=failed("AcceleratorError: CUDA error: an illegal memory access")), nodes=SOFT_XID),
        "failed", "retry", 4, True, "illegal memory access"),
    "Xid, but another node's rank had a bad recipe": (
        evidence(peers(r0=failed("RecipeError: optim.lr: -1 should be positive", code=2)), nodes=XID),
        "recipe", "stop", 2, True, "optim.lr"),
    "ECC by the rank": (
        evidence(peers(r3=failed("AcceleratorError: CUDA error: uncorrectable ECC error encountered"))),
        "hardware", "continue", 4, False, "Rank 3 on n2"),
    "network": (evidence(all_of(lost())), "network", "retry", 4, False, "none of them failed"),
    "port": (
        evidence(peers(r0=failed(PORT, lost=True))), "network", "retry", 4, False, "EADDRINUSE"),
    "no rendezvous, no outcome": (
        evidence({}, tails=dict.fromkeys(range(4), "DistNetworkError: Connection timed out, 10.0.0.1:29500")),
        "network", "retry", 4, False, "Connection timed out"),
    "nodes that did not meet": (
        evidence({}, nodes={"n1": NodeReport(network="no word from n2", ranks=(0, 1)), "n2": NodeReport(ranks=(2, 3))}),
        "network", "retry", 4, False, "The nodes did not meet: n1: no word from n2"),
    "a node that did not come, for it is dead": (
        evidence({}, nodes={"n1": NodeReport(network="no word from n2", ranks=(0, 1)), **SILENT}),
        "node_failure", "continue", 4, False, "Lost node n2"),
    "a node that was refused, so the others lacked it": (
        evidence({}, nodes={"n1": NodeReport(network="no word from n2", ranks=(0, 1)), **REFUSED}),
        "preflight", "continue", 4, False, "3 of 4 GPUs answer"),
    "hang": (
        evidence(mute(2, 3), hang=HANG), "hang", "retry", 4, True,
        "Rank 2 on n2 hung in phase step at step 120 (its process is stopped by a signal)"),
    "silent agent, so the others hung": (
        evidence({}, nodes=SILENT, hang=HANG), "node_failure", "continue", 4, False, "n2"),
    "hang, ended with SIGKILL": (
        evidence(mute(3), nodes=KILLED, hang=HANG), "hang", "retry", 4, True, "Rank 2 on n2 hung"),
    "preempted, and the save that it asked for hung": (
        evidence({}, slurm_state="PREEMPTED", stop_time=80.0, hang=HANG), "preempted", "continue", 4, False, ""),
    "a rank failed, so the others hung": (
        evidence(mute(2, 3) | {1: failed("ValueError: x", 60.0)}, hang=HANG), "failed", "retry", 4, True, "Rank 1"),
    "waited for a silent rank": (
        evidence(all_of(failed("RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms "
                               "for recv operation to complete", lost=True))),
        "hang", "retry", 4, True, "Timed out waiting"),
    "GPU memory": (evidence(peers(r2=failed(GPU_OOM))), "out_of_memory", "stop", 6, True, "unit_audio_s"),
    "GPU memory, seen in NCCL": (
        evidence(peers(r2=failed("DistBackendError: NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 "
                                 "'out of memory'", lost=True))),
        "out_of_memory", "stop", 6, True, "Rank 2"),
    "host memory": (
        evidence(peers(r1=failed("RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't "
                                 "allocate memory: you tried to allocate 4096 bytes"))),
        "out_of_memory", "stop", 6, True, "num_workers"),
    "killed, and Slurm knows why": (
        evidence(mute(3), nodes=KILLED, slurm_state="OUT_OF_MEMORY"),
        "out_of_memory", "stop", 6, True, "rank 3 on n2 was killed"),
    "killed, and a log knows why": (
        evidence(mute(3), nodes=KILLED, tails={3: "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0."}),
        "out_of_memory", "stop", 6, True, "oom_kill"),
    "killed, and nobody knows why": (
        evidence(mute(3), nodes=KILLED), "failed", "retry", 4, True, "No word from rank 3 on n2: killed by SIGKILL"),
    "137 of a node's only rank": (
        evidence({0: lost()}, nodes={"n1": NodeReport(ranks=(0, 1, 2)), "n2": NodeReport(ranks=(3,), exit_code=137)}),
        "failed", "retry", 4, True, "rank 3 on n2: killed by SIGKILL"),
    "launcher killed, its ranks saved": (
        evidence(all_of({**STOPPED, "message": "stopped by SIGTERM"}), committed_step=120,
                 nodes={"n2": NodeReport(ranks=(2, 3), exit_code=-9)}),
        "failed", "retry", 4, False, "launcher on n2 was killed by SIGKILL"),
    "recipe": (
        evidence(peers(r0=failed("RecipeError: 2 errors\n  optim.lr: -1\n  seed: x", code=2)), last_step=None),
        "recipe", "stop", 2, True, "seed: x"),
    "data": (evidence(peers(r1=failed("CorpusError: shard-3 cannot be read"))), "data", "stop", 4, True, "shard-3"),
    "model": (
        evidence(peers(r0=failed("ModelError: model.config: Wav2Vec2Config has no field hiden_size"))),
        "recipe", "stop", 2, True, "hiden_size"),
    "import error": (
        evidence({}, tails={1: "Traceback (most recent call last):\nModuleNotFoundError: No module named 'soxr'"}),
        "code", "stop", 4, True, "Rank 1 on n1 failed: ModuleNotFoundError"),
    "no usable checkpoint": (
        evidence(peers(r0=failed("CheckpointError: none of 2 can be used", code=5))),
        "no_checkpoint", "stop", 5, True, "none of 2"),
    "the first, not the loudest": (
        evidence(peers(r0=failed("ValueError: late", 99.5), r3=failed("ValueError: early", 99.0))),
        "failed", "retry", 4, True, "Rank 3 on n2 failed: ValueError: early"),
    "the lock of a dead attempt": (
        evidence({}, tails={0: "error: runs/r is being trained by pid 7 on n9, since 12:00; nothing was started"}),
        "failed", "retry", 4, True, "Trying again in 60 s"),
    "nothing known": (evidence({}, nodes={"n1": NodeReport(), "n2": NodeReport()}), "unknown", "retry", 4, True, ""),
}  # fmt: skip


def test_no_rank_is_missed_where_none_was_started():
    found = judge(evidence({}, nodes=REFUSED))
    assert [line.text for line in found.evidence] == ["3 of 4 GPUs answer"]


def lost_nodes(**more):
    """Slurm ended a job for a node's failure, and all its agents with it."""
    silent = {host: NodeReport(reported=False, ranks=ranks) for host, ranks in (("n1", (0, 1)), ("n2", (2, 3)))}
    return judge(evidence({}, nodes=silent, slurm_state="NODE_FAIL", **more))


def test_of_a_job_that_a_node_ended_only_the_node_that_is_down_is_excluded():
    found = lost_nodes(down_hosts=("n2",))
    assert found.message.startswith("Lost node n2: Slurm: NODE_FAIL")
    assert [entry.host for entry in found.exclude_hosts] == ["n2"]


def test_where_nobody_knows_which_node_it_was_none_is_excluded():
    """The node is up again: its job's other nodes are as likely as it."""
    found = lost_nodes()
    assert found.message.startswith("Lost a node: Slurm: NODE_FAIL")
    assert (found.action, found.exclude_hosts) == ("continue", ())


@pytest.mark.parametrize("name", CASES)
def test_verdict(name):
    given, kind, action, exit_code, uses_budget, text = CASES[name]
    found = judge(given)
    assert (found.kind, found.action, found.exit_code, found.uses_budget) == (kind, action, exit_code, uses_budget)
    assert text in found.message
    assert found.wait_s > 0 if kind == "network" else True


def test_every_kind_is_shown():
    assert {case[1] for case in CASES.values()} == set(KINDS)


def test_a_node_is_excluded_with_expiry_and_cap():
    found = judge(evidence({0: lost()}, nodes=SILENT), policy=Policy(exclusion_s=60))
    assert [(entry.host, entry.until) for entry in found.exclude_hosts] == [("n2", 1060.0)]
    assert "Without n2 for now" in found.message
    full = judge(evidence({}, nodes=REFUSED, excluded_hosts=("n7", "n8")), policy=Policy(max_excluded_hosts=2))
    assert (full.action, full.exclude_hosts) == ("stop", ())
    assert "2 nodes are excluded already" in full.message
    said = evidence({}, nodes=SILENT, slurm_state="NODE_FAIL", excluded_hosts=("n7", "n8"))
    assert judge(said, policy=Policy(max_excluded_hosts=2)).action == "continue"  # Slurm keeps off it by itself
    alone = judge(evidence({}, nodes=REFUSED), policy=Policy(max_excluded_hosts=0))
    assert alone.action == "stop"
    limit = judge(evidence(all_of(STOPPED), nodes=XID, stop_reason="time limit", committed_step=120))
    assert (limit.kind, [entry.host for entry in limit.exclude_hosts]) == ("time_limit", ["n2"])


def test_network_waits_longer_each_time_then_stops():
    policy, history = Policy(network_waits_s=(10, 60)), []
    for _ in range(3):
        history.append(judge(evidence(all_of(lost())), history, policy))
    assert [(past.action, past.wait_s) for past in history] == [("retry", 10), ("retry", 60), ("stop", 0)]
    assert "2 tries did not help" in history[-1].message
    again = judge(evidence(all_of(lost()), committed_step=110), history, policy)
    assert (again.action, again.wait_s) == ("retry", 10)


def run_of(*attempts):
    history = []
    for attempt in attempts:
        history.append(judge(attempt, history))
    return history


def test_a_hang_is_retried_once_and_the_same_step_again_stops():
    first, second = run_of(evidence({}, hang=HANG), evidence({}, hang=HANG))
    assert (first.action, second.action, second.kind) == ("retry", "stop", "hang")
    other = Hang(phase="step", step=140, rank=0, host="n1")
    assert run_of(evidence({}, hang=HANG), evidence({}, hang=other))[1].action == "retry"


def test_the_same_failure_at_the_same_step_stops_and_names_the_utterances():
    poison = evidence(peers(r1=failed(POISON)), committed_step=110)
    first, second = run_of(poison, poison)
    assert (first.action, first.step) == ("retry", 57)
    assert (second.action, second.utterances) == ("stop", ("utt-13", "utt-7"))
    assert "at step 57 in an earlier attempt" in second.message
    assert "utt-13, utt-7" in second.message
    crash = evidence(peers(r1=failed("IndexError: index 7 is out of bounds", 99)), utterances=("u1",), last_step=130)
    other = evidence(peers(r2=failed("IndexError: index 9 is out of bounds", 99)), utterances=("u1",), last_step=130)
    assert "u1" in run_of(crash, other)[1].message
    later = evidence(peers(r2=failed("IndexError: index 9 is out of bounds", 99)), last_step=131)
    assert [past.action for past in run_of(crash, later)] == ["retry", "retry"]


def on(host, message, **more):
    ranks = {0: failed(message)}
    return Evidence(num_ranks=1, ranks=ranks, nodes={host: NodeReport(ranks=(0,), exit_code=1)}, **more)


@pytest.mark.parametrize("message", ["CUDA error: uncorrectable ECC error encountered", "ValueError: odd"])
def test_the_same_failure_on_disjoint_nodes_is_the_code(message):
    second = run_of(on("n1", message, last_step=5), on("n2", message, last_step=6))[1]
    assert (second.kind, second.action, second.exclude_hosts) == ("code", "stop", ())
    assert "on n1 too" in second.message
    between = run_of(on("n1", message, last_step=5), on("n2", message, last_step=9, committed_step=8))[1]
    assert between.action != "stop"  # it came far in between


def failure(number, **more):
    words = ("alpha", "beta", "gamma", "delta", "epsilon")
    return evidence(peers(r1=failed(f"ValueError: {words[number]}")), last_step=100 + number, **more)


def test_three_failures_with_nothing_saved_stop_and_what_ends_from_outside_does_not_count():
    outside = evidence({}, slurm_state="PREEMPTED")
    found = run_of(failure(0), outside, failure(1), outside, outside, failure(2))
    assert [past.action for past in found] == ["retry", "continue", "retry", "continue", "continue", "stop"]
    assert "3 attempts failed by themselves with nothing new saved" in found[-1].message
    found = run_of(failure(0), failure(1), failure(2, committed_step=101), failure(3), failure(4))
    assert [past.action for past in found] == ["retry"] * 5
    assert [past.uses_budget for past in found] == [True, True, False, True, True]
    saved = evidence(all_of(STOPPED), stop_reason="preempted", committed_step=120)
    assert run_of(failure(0), failure(1), saved, failure(2))[-1].action == "retry"


def test_attempts_too_short_to_save_are_told():
    short = evidence({}, slurm_state="TIMEOUT", resumed_step=None)
    assert "2 such attempts saved nothing" in run_of(short, short)[1].message


def test_evidence_is_worst_first_with_rank_host_and_time():
    found = judge(evidence(peers(r3=failed("ValueError: early", 99.0)), slurm_state="FAILED"))
    assert (found.rank, found.host) == (3, "n2")
    first, *_, last = found.evidence
    assert (first.rank, first.host, first.time, first.text) == (3, "n2", 99.0, "ValueError: early")
    assert last.text == "Slurm: FAILED"
    assert "ranks 0, 1, 2 only lost a peer" in [line.text for line in found.evidence]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_the_state_of_a_job_that_its_own_agents_judge_is_no_evidence(state):
    found = judge(evidence(peers(r3=failed("ValueError: early")), slurm_state=state))
    assert [line.text for line in found.evidence if "Slurm" in line.text] == []


def test_json_round_trip_and_later_versions():
    for given, *_ in CASES.values():
        found = judge(given)
        assert Verdict.from_json(json.loads(json.dumps(found.to_json()))) == found
    later = Verdict.from_json({"kind": "eaten_by_a_fox", "new": 1, "hosts": ["n1"], "by_itself": True})
    assert (later.kind, later.hosts, later.by_itself) == ("unknown", ("n1",), True)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("std::bad_alloc", "out_of_memory"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "out_of_memory"),
        ("_ArrayMemoryError: Unable to allocate 8.00 GiB for an array", "out_of_memory"),
        ("ImportError: libx.so: failed to map segment from shared object: Cannot allocate memory", "out_of_memory"),
        ("ImportError: libcudart.so.13: cannot open shared object file: No such file or directory", "code"),
        ("/usr/bin/python: No module named asr_train", "code"),
        ("error: CorpusError is in a text", "data"),
        ("socket.gaierror: [Errno -3] Temporary failure in name resolution", "network"),
        ("UserWarning: no CUDA-capable device is detected", None),
        ("step 12 loss 3.4", None),
    ],
)
def test_signs(text, kind):
    found = signs.read_log(f"before\n{text}\nafter")
    assert (found.kind if found else None) == kind
    assert found is None or found.text == text


def random_evidence(rng):
    texts = ["", None, 7, GPU_OOM, PEER, PORT, POISON, "ValueError: x", "RecipeError: y", "stopped by SIGTERM", "ECC"]
    hosts = rng.sample(["n1", "n2", "n3", "n4"], rng.randint(0, 3))

    def step():
        return rng.choice([None, 0, 5, rng.randint(0, 300)])

    def outcome():
        full = {
            "status": rng.choice(["done", "stopped", "failed", "failed", "failed", "odd"]),
            "message": rng.choice(texts), "exit_code": rng.choice([0, 2, 3, 4, 5, None, "4"]),
            "lost_peer": rng.random() < 0.5, "time": rng.choice([None, "now", 50.0, rng.uniform(0, 200)]),
        }  # fmt: skip
        return {key: value for key, value in full.items() if rng.random() < 0.9}

    def node(index):
        ranks = rng.choice([(), (index,), (2 * index, 2 * index + 1)])
        return NodeReport(
            preflight=rng.choice([None, None, None, "no GPU"]), reported=rng.random() < 0.8, ranks=ranks,
            exit_code=rng.choice([None, 0, 1, -9, 137, 255, -200]), tail=rng.choice(["", TORCHRUN, PEER]),
            hardware=rng.choice([None, None, "Xid 79", "Xid (PCI:0): 31, x", "odd"]),
        )  # fmt: skip

    hang = Hang(
        phase=rng.choice(["start", "step"]), step=step(), rank=rng.choice([None, 1]), time=rng.choice([None, 60.0])
    )
    states = [None, None, "", "odd", "RUNNING", "COMPLETED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL",
              "CANCELLED+", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"]  # fmt: skip
    return Evidence(
        num_ranks=rng.randint(0, 6),
        ranks={rank: outcome() for rank in rng.sample(range(6), rng.randint(0, 6))},
        nodes={host: node(index) for index, host in enumerate(hosts)},
        slurm_state=rng.choice(states),
        stop_reason=rng.choice([None, None, None, "user", "time limit", "preempted", "SIGTERM", "SIGUSR2", "odd"]),
        stop_time=rng.choice([None, 100.0]), resumed_step=step(), last_step=step(),
        committed_step=rng.choice([None, None, None, step()]), hang=rng.choice([None, None, None, hang]),
        tails={rank: str(rng.choice(texts)) for rank in rng.sample(range(6), rng.randint(0, 2))},
        is_done=rng.random() < 0.02, excluded_hosts=tuple(rng.sample(["n1", "n8", "n9"], rng.randint(0, 3))),
    )  # fmt: skip


def test_no_evidence_breaks_it_and_nothing_goes_on_when_the_budget_is_used_up():
    rng, policy, num_spent = random.Random(4), Policy(), 0
    for _ in range(300):
        history, num_failed = [], 0
        for _ in range(12):
            given = random_evidence(rng)
            found = judge(given, history, policy)
            assert found == judge(given, history, policy)
            assert found.message
            num_failed = 0 if found.committed else num_failed + found.by_itself  # counted here by hand
            num_spent += num_failed >= policy.max_failed_attempts
            if num_failed >= policy.max_failed_attempts:
                assert found.action in ("stop", "done")
            assert not (found.exclude_hosts and found.action in ("stop", "done"))
            assert (found.exit_code == 0) == (found.kind == "done")
            history.append(Verdict.from_json(json.loads(json.dumps(found.to_json()))))
    assert num_spent > 100
