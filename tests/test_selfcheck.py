"""A node's own check: GPUs that compute rightly, and a first meeting of all nodes that names who is missing."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from asr_train import selfcheck
from asr_train.selfcheck import NotMetError, Result


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def started(*arguments):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    command = [sys.executable, "-m", "asr_train.selfcheck", *map(str, arguments)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """Its exit code, and its last line, decoded."""
    out, error = process.communicate(timeout=300)
    return process.returncode, json.loads(out.splitlines()[-1]) if out else error


def meeting(port, node, hosts, timeout_s):
    """What one node of a meeting, here a thread, is told."""
    try:
        selfcheck.gather(f"127.0.0.1:{port}", node, hosts, timeout_s)
    except NotMetError as error:
        return error
    return None


def met(hosts, present, timeout_s):
    """Node -> what it is told, where only some nodes come."""
    port, told = free_port(), {}

    def come(node):
        told[node] = meeting(port, node, hosts, timeout_s)

    threads = [threading.Thread(target=come, args=(node,)) for node in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_two_nodes_meet_and_sum():
    port = free_port()
    nodes = [started("--meet", f"127.0.0.1:{port}", "--node", node, "--hosts", "n1,n2") for node in (0, 1)]
    for node, host in zip(nodes, ("n1", "n2"), strict=True):
        code, result = ended(node)
        assert code == 0, result
        assert (result["host"], result["problems"], result["missing"]) == (host, [], [])
        assert result["network"] is None


def test_every_node_that_came_is_told_who_did_not():
    told = met(["n1", "n2", "n3", "n4"], present=[0, 2], timeout_s=5)
    assert [told[0].missing, told[2].missing] == [["n2", "n4"], ["n2", "n4"]]
    assert [told[0].unreached, told[2].unreached] == [None, None]


def test_a_missing_node_is_named_in_the_result_of_the_program():
    code, result = ended(started("--meet", f"127.0.0.1:{free_port()}", "--node", 0, "--hosts", "n1,n2", "--timeout", 1))
    assert (code, result["missing"], result["problems"]) == (4, ["n2"], [])


def test_a_node_that_does_not_reach_node_0_says_so_in_time():
    port, begun = free_port(), time.monotonic()
    told = meeting(port, 1, ["n1", "n2"], 2)
    assert time.monotonic() - begun < 60
    assert f"n2 does not reach n1 at 127.0.0.1:{port} within 2 s" in told.unreached
    assert "refused" in told.unreached


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = meeting(server.getsockname()[1], 0, ["n1", "n2"], 2)
    assert "n1 cannot listen at" in told.network


def test_the_product_is_exact_and_a_wrong_number_is_seen():
    left, right = selfcheck.matrices()
    exact = left.double() @ right.double()
    assert selfcheck.product_problem(torch.device("cpu"), left, right, exact.float()) is None
    exact[3, 5] += 1
    problem = selfcheck.product_problem(torch.device("cpu"), left, right, exact.float())
    assert "1 of 1048576 numbers" in problem


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_missing_gpus_are_counted():
    result = Result(host="n1")
    selfcheck.check_gpus(4, result)
    assert result.problems == ["torch sees 0 of 4 GPUs: have the driver and the GPUs looked at"]
    assert not result.is_well


def test_every_gpu_that_is_not_fit_is_named(monkeypatch):
    """Four of them: free and right, somebody else's, wrong, and gone."""

    def product_problem(device, *_):
        if device.index == 3:
            raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")
        return "computes wrongly: 7 of 9 numbers" if device.index == 2 else None

    properties = SimpleNamespace(name="A100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((20 if index == 1 else 79) * 2**30, 80 * 2**30))
    monkeypatch.setattr(selfcheck, "product_problem", product_problem)
    result = Result(host="n1")
    selfcheck.check_gpus(4, result)
    assert [gpu["index"] for gpu in result.gpus] == [0, 1, 2, 3]
    assert result.problems == [
        "GPU 1: 60.0 of 80.0 GiB are in use already: end who uses it",
        "GPU 2 computes wrongly: 7 of 9 numbers: have it replaced",
        "GPU 3: CUDA error: unspecified launch failure",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_of_this_machine_compute():
    result = Result(host="n1")
    selfcheck.check_gpus(torch.cuda.device_count(), result)
    assert result.problems == []
    assert all(gpu["memory_bytes"] > 2**30 for gpu in result.gpus)


def test_a_node_number_without_a_name_is_refused():
    code, said = ended(started("--meet", "127.0.0.1:1", "--node", 2, "--hosts", "n1,n2"))
    assert code == 2
    assert "--hosts names 2 nodes" in said
