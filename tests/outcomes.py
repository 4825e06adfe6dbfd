"""How attempts ended, as agents see it, and the verdicts that these are worth."""

from launch.verdict import Evidence, Hang, NodeReport

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
