"""From evidence to verdict: every rule, the combinations that mislead, and that no evidence can break it."""

import json
import random

import pytest
from outcomes import (
    CASES,
    GPU_OOM,
    HANG,
    PEER,
    POISON,
    PORT,
    REFUSED,
    SILENT,
    STOPPED,
    TORCHRUN,
    XID,
    all_of,
    evidence,
    failed,
    lost,
    peers,
)

from launch.ending import signs
from launch.ending.outcome import judge
from launch.verdict import KINDS, Evidence, Hang, NodeReport, Policy, Verdict


def test_no_rank_is_missed_where_none_was_started():
    found = judge(evidence({}, nodes=REFUSED))
    assert [line.text for line in found.evidence] == ["3 of 4 GPUs answer"]


def test_no_rank_is_missed_at_a_start_of_a_run_that_is_done():
    """`wavefleet train` once more starts a process that says so, and makes no attempt."""
    assert judge(evidence({}, is_done=True)).evidence == ()


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
