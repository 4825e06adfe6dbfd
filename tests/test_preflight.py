"""The check of a node before training: all that is wrong, whose fault it is, and that the other nodes know it soon."""

import os
import socket
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pynvml
import pytest

from asr_train.files import hash_json, write_json
from asr_train.run_dir import RunDir
from launch.ending.outcome import judge
from launch.node import devices, hardware, node_check, preflight
from launch.node.hardware import GpuWatch
from launch.node.node_check import Preflight, Wanted
from launch.node.preflight import Place
from launch.verdict import Evidence, NodeReport

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return RunDir(folder)


def of_node(run, *commands, **more):
    return node_check.check_node(run, "n1", Wanted(commands=commands, **more), ENVIRON)


def save_checkpoint(run, step, size):
    folder = run.checkpoints / f"step-{step:010d}"
    (folder / "shards").mkdir(parents=True)
    manifest = {"step": step, "files": {"shards/a": {"size": size, "hash": ""}}}
    write_json(folder / "MANIFEST.json", {**manifest, "manifest_hash": hash_json(manifest)})


def disk(monkeypatch, free_bytes, free_files=10**6):
    found = SimpleNamespace(f_bavail=free_bytes, f_frsize=1, f_files=10**6, f_favail=free_files)
    monkeypatch.setattr(os, "statvfs", lambda path: found)


# One node


def test_a_node_with_nothing_wrong(run):
    found = of_node(run, "true")
    assert found.is_well, found
    assert {"Python", "torch", "the code"} <= set(found.facts)
    assert list(run.checkpoints.iterdir()) == []  # the file that it wrote is gone


def test_everything_that_is_wrong_is_said_at_once(run, monkeypatch):
    disk(monkeypatch, free_bytes=2**29, free_files=7)
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: ["GPU-1", "GPU-2", "GPU-3"])
    run.checkpoints.write_text("a file where a folder should be")
    said = of_node(run, "echo licence server is down; exit 3", "false", num_gpus=4).problem
    assert "the driver shows 3 of 4 GPUs" in said
    assert "0.50 GiB are free" in said
    assert "7 more files" in said
    assert "checkpoints cannot be written: File exists" in said
    assert "preflight.0: licence server is down (`echo licence server is down; exit 3` ended with 3)" in said
    assert "preflight.1: it printed nothing (`false` ended with 1)" in said


def test_gpus_that_are_hidden_are_named_as_that(run, monkeypatch):
    monkeypatch.setattr(devices, "_installed_gpus", lambda: ["GPU-1", "GPU-2"])
    found = node_check.check_node(run, "n1", Wanted(num_gpus=2), {**ENVIRON, "CUDA_VISIBLE_DEVICES": "1"})
    assert "shows 1 of 2 GPUs (CUDA_VISIBLE_DEVICES=1)" in found.problem


@pytest.mark.parametrize(("free", "is_enough"), [(2 * 5000, True), (2 * 5000 - 1, False)])
def test_room_is_needed_for_two_checkpoints_like_the_largest(run, monkeypatch, free, is_enough):
    save_checkpoint(run, 1, 5000)
    save_checkpoint(run, 2, 3000)
    disk(monkeypatch, free_bytes=free)
    assert of_node(run).is_well == is_enough


def test_a_file_system_that_counts_no_files_is_taken(run, monkeypatch):
    found = SimpleNamespace(f_bavail=2**40, f_frsize=1, f_files=0, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    assert of_node(run).is_well


def test_a_disk_that_takes_no_more_is_seen_by_writing(run, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "checkpoints cannot be written: No space left on device" in of_node(run).problem
    assert list(run.checkpoints.iterdir()) == []


def test_a_site_check_that_hangs_is_ended(run, monkeypatch):
    monkeypatch.setattr(node_check, "_COMMAND_S", 0.3)
    begun = time.monotonic()
    found = of_node(run, "sleep 3600 | cat")
    assert "`sleep 3600 | cat` did not end within" in found.problem
    assert time.monotonic() - begun < 300


# Broken GPUs


MEMORY_BYTES = {"GPU-1": round(79.3 * 2**30), "GPU-2": round(39.4 * 2**30)}


class Nvml:
    """A driver with two GPUs: what they answer, or None for a question that they do not support."""

    def __init__(self, monkeypatch, *, remapped=None, retiring=None, ecc=0):
        self.remapped, self.retiring, self.ecc, self.events = remapped, retiring, ecc, []
        names = {
            "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlEventSetCreate": lambda: "events",
            "nvmlEventSetFree": lambda events: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetUUID": lambda gpu: gpu, "nvmlDeviceRegisterEvents": lambda gpu, kinds, events: None,
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=MEMORY_BYTES[gpu]),
            "nvmlDeviceGetRemappedRows": lambda gpu: self._answer(self.remapped),
            "nvmlDeviceGetRetiredPagesPendingStatus": lambda gpu: self._answer(self.retiring),
            "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, since: self._answer(self.ecc),
            "nvmlEventSetWait_v2": lambda events, timeout_ms: self._event(),
        }  # fmt: skip
        for name, function in names.items():
            monkeypatch.setattr(hardware.pynvml, name, function)

    def _answer(self, value):
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def _event(self):
        if not self.events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        xid, gpu = self.events.pop(0)
        return SimpleNamespace(eventData=xid, device=gpu)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, None),
        ({"remapped": (3, 0, 0, 0)}, None),
        ({"remapped": (3, 1, 1, 0)}, "replaces at its next reset"),
        ({"remapped": (3, 1, 1, 1)}, "can no longer replace"),
        ({"retiring": 1}, "next reboot"),
        ({"ecc": None}, None),
    ],
)
def test_gpus_with_bad_memory_are_hardware_errors(run, monkeypatch, answers, expected):
    Nvml(monkeypatch, **answers)
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: ["GPU-1", "GPU-2"])
    found = of_node(run, num_gpus=2)
    assert found.problem is None
    if expected is None:
        assert found.hardware is None
    else:
        assert f"GPU 0 (GPU-1) {found.hardware}".count(expected) == 2  # both of them


def test_gpus_are_as_large_as_the_profile_says(run, monkeypatch):
    Nvml(monkeypatch)
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: ["GPU-1", "GPU-2"])
    assert of_node(run, num_gpus=2, gpu_memory_bytes=40 * 2**30).is_well
    said = of_node(run, num_gpus=2, gpu_memory_bytes=80 * 2**30).problem
    assert said == "GPU 1 (GPU-2) has 39.4 GiB, and gpu_memory is 80 GiB"


def test_errors_while_a_training_ran_are_told_once(monkeypatch):
    driver = Nvml(monkeypatch, ecc=7)
    with GpuWatch(["GPU-1", "GPU-2"]) as gpus:
        assert gpus.errors() == []
        driver.events, driver.ecc = [(79, "GPU-2"), (31, "GPU-1")], 9
        said = gpus.errors()
        assert said[:2] == ["Xid 79 on GPU 1 (GPU-2)", "Xid 31 on GPU 0 (GPU-1)"]
        assert said[2] == "uncorrectable ECC errors on GPU 0 (GPU-1): 2 more"
        assert gpus.errors() == []


def test_a_machine_without_a_driver_has_nothing_to_say(monkeypatch):
    def absent():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(hardware.pynvml, "nvmlInit", absent)
    with GpuWatch([]) as gpus:
        assert (gpus.broken, gpus.errors()) == ([], [])


@pytest.mark.parametrize(("text", "kind"), [("Xid 79 on GPU 1 (GPU-2)", "hardware"), ("Xid 31 on GPU 0", "unknown")])
def test_the_verdict_knows_which_of_them_speak_against_the_node(text, kind):
    nodes = {"n1": NodeReport(), "n2": NodeReport(hardware=text)}
    assert judge(Evidence(num_ranks=0, nodes=nodes)).kind == kind


# Several nodes

SAME = {"torch": "2.13.0", "the code": "abc"}


def test_the_node_that_differs_from_most_is_named():
    facts = {"n1": SAME, "n2": {**SAME, "torch": "2.9.1"}, "n3": SAME}
    assert preflight.differences(facts) == {"n2": "torch is 2.9.1, and 2.13.0 on n1, n3: all nodes need the same"}


def test_of_two_that_differ_the_first_counts():
    facts = {"n1": SAME, "n2": {"torch": "2.13.0", "the code": "xyz"}}
    assert list(preflight.differences(facts)) == ["n2"]
    assert preflight.differences({"n1": SAME, "n2": SAME}) == {}


def test_a_library_that_one_node_lacks_is_a_difference():
    facts = {"n1": {**SAME, "deepspeed": "0.19"}, "n2": SAME, "n3": {**SAME, "deepspeed": "0.19"}}
    assert "deepspeed is missing, and 0.19 on n1, n3" in preflight.differences(facts)["n2"]


def well(**more):
    return Preflight(**{"facts": SAME, "is_final": True, **more})


def test_a_node_that_does_not_reach_node_0_has_a_problem():
    found = preflight.judged({"n1": well(network="no word from n3"), "n2": well(), "n3": well(unreached="refused")},
                             ("n1", "n2", "n3"))  # fmt: skip
    assert [found[host].problem for host in ("n1", "n2", "n3")] == [None, None, "refused"]


def test_node_0_has_the_problem_when_nobody_reaches_it():
    found = preflight.judged({"n1": well(), "n2": well(unreached="refused"), "n3": well(unreached="refused")},
                             ("n1", "n2", "n3"))  # fmt: skip
    assert found["n1"].problem == "none of n2, n3 reached it: refused"
    assert [found[host].problem for host in ("n2", "n3")] == [None, None]


def place(tmp_path, node, hosts=("n1", "n2"), port=0):
    folder = tmp_path / "agents"
    folder.mkdir(exist_ok=True)
    return Place(folder=folder, node=node, hosts=hosts, meet=f"127.0.0.1:{port}")


def checked(run, tmp_path, commands):
    """Two nodes that check together, each with its own commands: what each of them knows in the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    known = {}

    def one(node):
        known[node] = preflight.check(
            run, place(tmp_path, node, port=port), Wanted(commands=commands[node]), environ=ENVIRON
        )

    threads = [threading.Thread(target=one, args=(node,)) for node in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return known


def test_two_nodes_that_are_well_may_start(run, tmp_path):
    known = checked(run, tmp_path, [(), ()])
    assert known[0] == known[1]
    assert preflight.may_start(known[0], ("n1", "n2"))


def test_the_others_know_at_once_of_a_node_that_may_not_start(run, tmp_path):
    """Before torch is even imported; nobody is left waiting for a collective."""
    begun = time.monotonic()
    known = checked(run, tmp_path, [(), ("echo no scratch here; exit 1",)])
    assert time.monotonic() - begun < preflight.MEET_S
    for found in known.values():
        assert "no scratch here" in found["n2"].problem
        assert not preflight.may_start(found, ("n1", "n2"))
    assert known[0]["n1"].problem is None


def test_a_node_with_other_versions_is_refused(run, tmp_path):
    mine = of_node(run)
    other = Preflight(facts={**mine.facts, "torch": "1.0"}, is_final=True)
    third = Preflight(facts=mine.facts, is_final=True)
    there = place(tmp_path, 0, hosts=("n1", "n2", "n3"))
    for number, node in ((1, other), (2, third)):
        write_json(there.folder / f"preflight-{number}.json", {**asdict(node), "of_a_later_version": True})
    found = preflight.check(run, there, Wanted(), environ=ENVIRON, timeout_s=1)
    assert found["n2"].problem.startswith("torch is 1.0, and ")
    assert [found["n1"].problem, found["n3"].problem] == [None, None]


def test_a_node_that_never_says_anything_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_GRACE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    there = place(tmp_path, 0, port=port)
    found = preflight.check(run, there, Wanted(), environ=ENVIRON, timeout_s=1)
    assert set(found) == {"n1"}
    assert "no word from n2" in found["n1"].network
    assert not preflight.may_start(found, there.hosts)


def test_without_a_word_from_node_0_no_node_starts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_MARGIN_S", 0.5)
    there = place(tmp_path, 1)
    found = preflight.check(run, there, Wanted(), environ=ENVIRON, timeout_s=0.5)
    assert "no word from n1" in found["n2"].network
    assert not preflight.may_start(found, there.hosts)


def test_a_job_that_is_asked_to_end_does_not_wait(run, tmp_path):
    begun = time.monotonic()
    found = preflight.check(run, place(tmp_path, 1), Wanted(), environ=ENVIRON, is_asked=lambda: True)
    assert time.monotonic() - begun < preflight.MEET_S
    assert not preflight.may_start(found, ("n1", "n2"))


def test_a_selfcheck_that_dies_is_a_problem_of_the_node(run, tmp_path):
    broken = {**ENVIRON, "PYTHONPATH": str(tmp_path / "broken")}
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so: cannot open')")
    found = preflight.check(run, place(tmp_path, 0), Wanted(), environ=broken)
    assert "its check in torch ended with 1" in found["n1"].problem
    assert "libcudart.so" in found["n1"].problem


def test_one_machine_without_gpus_is_checked_without_torch(run, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_selfcheck", lambda *_: pytest.fail("started the check in torch"))
    there = place(tmp_path, 0, hosts=("n1",))
    assert preflight.may_start(preflight.check(run, there, Wanted(), environ=ENVIRON), there.hosts)
