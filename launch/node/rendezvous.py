"""Files through which the node agents of one job meet: address and port, heartbeats, how each node ended.

Everything lies in `agents/<job>.<restart>/` of the run directory, on the file system that all nodes share.
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from asr_train.errors import WavefleetError
from asr_train.files import read_json, write_json

_POLL_S = 0.2


class RendezvousError(WavefleetError):
    """The nodes of a job did not find each other."""


def interface_address(name: str) -> str:
    """IPv4 address of a network interface of this machine.

    Raises:
        RendezvousError: there is no such interface, or it has none; lists those that have one.
    """
    found = {
        interface: str(entry.address)
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    if name not in found:
        have = ", ".join(f"{interface} ({address})" for interface, address in sorted(found.items()))
        raise RendezvousError(f"rendezvous_interface: {socket.gethostname()} has no address on {name}, only on {have}")
    return found[name]


@dataclass(frozen=True)
class Meeting:
    """The files of one launch: one start of one job.

    Attributes:
        folder: `agents/<job>.<restart>`.
        node: number of this node, from 0.
        num_nodes: all nodes.
    """

    folder: Path
    node: int
    num_nodes: int

    def publish(self, address: str) -> tuple[str, int]:
        """Choose a free port and tell all nodes where to meet; node 0."""
        with socket.create_server(("", 0)) as server:
            port = int(server.getsockname()[1])
        write_json(self.folder / "rendezvous.json", {"address": address, "port": port, "host": socket.gethostname()})
        return address, port

    def find(self, timeout_s: float) -> tuple[str, int]:
        """Where to meet; waits for node 0 to say it.

        Raises:
            RendezvousError: it said nothing in time.
        """
        path = self.folder / "rendezvous.json"
        until = time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > until:
                raise RendezvousError(f"node 0 did not say where to meet within {timeout_s:.0f} s: {path} is missing")
            time.sleep(_POLL_S)
        content = read_json(path)
        return str(content["address"]), int(content["port"])

    def beat(self) -> None:
        """Show that this node's agent is alive; by the time of a file, so it costs the file server little."""
        path = self.folder / f"node-{self.node}.json"
        if path.exists():
            os.utime(path)
        else:
            write_json(path, {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()})

    def report(self, content: Mapping[str, Any]) -> None:
        """Write how this node's part ended."""
        write_json(
            self.folder / f"report-{self.node}.json",
            {"node": self.node, "host": socket.gethostname(), "time": time.time(), **content},
        )

    def reports(self, timeout_s: float) -> dict[int, dict[str, Any]]:
        """Node -> its report; waits for all, or until the time is up."""
        until = time.monotonic() + timeout_s
        while True:
            found = {
                node: read_json(path)
                for node in range(self.num_nodes)
                if (path := self.folder / f"report-{node}.json").exists()
            }
            if len(found) == self.num_nodes or time.monotonic() > until:
                return found
            time.sleep(_POLL_S)

    def wait_for_end(self, timeout_s: float) -> None:
        """Wait until node 0 has decided; a node that goes first would have `srun` end the others."""
        until = time.monotonic() + timeout_s
        while not (self.folder / "decided").exists() and time.monotonic() < until:
            time.sleep(_POLL_S)

    def decide(self) -> None:
        """Let the other nodes go; node 0."""
        (self.folder / "decided").touch()
