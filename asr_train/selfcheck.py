"""`python -m asr_train.selfcheck`: can this node compute, and do the nodes of a job reach each other?

A small allocation and an exact product of matrices on every GPU; with `--meet` a first all-reduce over gloo, before
which every node writes its name into a store on node 0, so that one that does not come is named. Prints one line of
JSON at the end.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from asr_train.errors import EXIT_DONE, EXIT_FAILED, RecipeError, run_main

SIZE = 1024  # of the matrices: 12 MiB, and work for all parts of a GPU
_POLL_S = 0.2
_MARGIN_S = 10.0  # for those who wait for node 0, which waits so long for others
_LARGEST = 3  # values from -3 to 3: sums of 1024 products are exact in float32, with TF32 too
_MOST_IN_USE = 0.5  # of a GPU's memory before we take any; more is somebody else's program


@dataclass(kw_only=True)
class Result:
    """What was found.

    Attributes:
        problems: of this node's own, in sentences.
        unreached: how this node failed to reach node 0.
        missing: nodes that did not come to the all-reduce in time, as node 0 saw it.
        network: what else was wrong between the nodes; nobody can say whose fault that is.
        gpus: name and memory of each, as torch sees them.
        seconds: what took how long.
    """

    host: str
    problems: list[str] = field(default_factory=list)
    unreached: str | None = None
    missing: list[str] = field(default_factory=list)
    network: str | None = None
    gpus: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        """Whether training may start."""
        return not (self.problems or self.unreached or self.missing or self.network)


class NotMetError(Exception):
    """The nodes did not meet; the fields are those of `Result`."""

    def __init__(
        self, *, missing: Sequence[str] = (), unreached: str | None = None, network: str | None = None
    ) -> None:
        self.missing, self.unreached, self.network = list(missing), unreached, network
        super().__init__(unreached or network or f"no word from {', '.join(missing)}")


def main(argv: Sequence[str]) -> int:
    """Check, and print the result as the last line."""
    options = _parser().parse_args(argv)
    hosts = options.hosts.split(",") if options.hosts else []
    if options.meet and not 0 <= options.node < len(hosts):
        raise RecipeError(f"--node {options.node}: --hosts names {len(hosts)} nodes")
    result = Result(host=hosts[options.node] if hosts else socket.gethostname())
    begun = time.monotonic()
    if options.gpus:
        check_gpus(options.gpus, result)
        result.seconds["gpus"] = round(time.monotonic() - begun, 3)
    if options.meet:  # also with a bad GPU: what else is wrong should be known now
        begun = time.monotonic()
        _meet(options, hosts, result)
        result.seconds["meet"] = round(time.monotonic() - begun, 3)
    print(json.dumps(asdict(result)), flush=True)
    return EXIT_DONE if result.is_well else EXIT_FAILED


def check_gpus(wanted: int, result: Result) -> None:
    """Count the GPUs, and have each compute."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < wanted:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        result.problems.append(f"torch sees {found} of {wanted} GPUs{hint}: have the driver and the GPUs looked at")
    left, right = matrices()
    product = left @ right
    with ThreadPoolExecutor(max_workers=max(1, found)) as pool:  # a GPU's context takes most of a second
        for gpu, problem in pool.map(lambda index: _check_gpu(index, left, right, product), range(found)):
            result.gpus.append(gpu)
            result.problems += [problem] if problem else []


def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices of small whole numbers, whose product every processor gets exactly."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, SIZE, SIZE)
    left, right = torch.randint(-_LARGEST, _LARGEST + 1, shape, generator=generator).float()
    return left, right


def product_problem(
    device: torch.device, left: torch.Tensor, right: torch.Tensor, expected: torch.Tensor
) -> str | None:
    """What is wrong with a device's product, if anything is."""
    got = (left.to(device) @ right.to(device)).cpu()
    wrong = int((got != expected).sum())
    return f"computes wrongly: {wrong} of {expected.numel()} numbers of a product of matrices" if wrong else None


def _check_gpu(
    index: int, left: torch.Tensor, right: torch.Tensor, product: torch.Tensor
) -> tuple[dict[str, Any], str | None]:
    """What a GPU is, and what is wrong with it, if anything is."""
    gpu: dict[str, Any] = {"index": index}
    try:
        properties = torch.cuda.get_device_properties(index)
        gpu |= {"name": properties.name, "memory_bytes": properties.total_memory}
        free, total = torch.cuda.mem_get_info(index)
        if free < total * (1 - _MOST_IN_USE):
            used = (total - free) / 2**30
            return gpu, f"GPU {index}: {used:.1f} of {total / 2**30:.1f} GiB are in use already: end who uses it"
        problem = product_problem(torch.device("cuda", index), left, right, product)
    except RuntimeError as error:
        return gpu, f"GPU {index}: {_first_line(error)}"
    return gpu, None if problem is None else f"GPU {index} {problem}: have it replaced"


def _meet(options: argparse.Namespace, hosts: Sequence[str], result: Result) -> None:
    try:
        store = gather(options.meet, options.node, hosts, options.timeout)
    except NotMetError as error:
        result.missing, result.unreached, result.network = error.missing, error.unreached, error.network
        return
    result.network = all_reduce(store, options.node, hosts, options.timeout)


def gather(meet: str, node: int, hosts: Sequence[str], timeout_s: float) -> Store:
    """Meet all nodes at a store on node 0.

    Args:
        meet: `ADDRESS:PORT` of node 0.
        node: number of this node.
        hosts: names of all nodes, by number.
        timeout_s: for node 0 to listen, and then for all nodes to come.

    Raises:
        NotMetError: some did not come; every node that did is told which.
    """
    until = time.monotonic() + timeout_s
    address, _, port = meet.rpartition(":")
    if node != 0 and (problem := _unreachable(address, int(port), until)):
        where = f"{hosts[node]} does not reach {hosts[0]} at {meet} within {timeout_s:.0f} s: {problem}"
        raise NotMetError(unreached=f"{where}. Is the address right, is a firewall in between?")
    try:
        store = TCPStore(
            address,
            int(port),
            is_master=node == 0,
            timeout=timedelta(seconds=timeout_s + _MARGIN_S),
            wait_for_workers=False,
        )
    except RuntimeError as error:  # torch's Dist errors are of this kind
        does = "cannot listen" if node == 0 else "is not understood"
        raise NotMetError(network=f"{hosts[node]} {does} at {meet}: {_first_line(error)}") from None
    store.set(f"host/{node}", hosts[node])
    if node == 0:
        _await_all(store, hosts, until - time.monotonic())
    try:
        missing = json.loads(store.get("missing"))  # waits for node 0 to say it
    except RuntimeError as error:
        lost = f"{hosts[node]} reached {hosts[0]} at {meet} and lost it again: {_first_line(error)}"
        raise NotMetError(network=lost) from None
    if missing:
        came = [number for number, host in enumerate(hosts) if host not in missing]
        _leave_together(store, node, came)
        raise NotMetError(missing=missing)
    return store


def _unreachable(address: str, port: int, until: float) -> str | None:
    """Try to connect until then; why it did not work. torch's store would try for twice the time, and say less."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() + _POLL_S > until:
                return str(error)
            time.sleep(_POLL_S)
        else:
            return None


def _await_all(store: Store, hosts: Sequence[str], timeout_s: float) -> None:
    """Node 0: wait for all, and tell all who is missing."""
    keys = [f"host/{number}" for number in range(len(hosts))]
    with suppress(RuntimeError):
        store.wait(keys, timedelta(seconds=max(1.0, timeout_s)))
    missing = [host for host, key in zip(hosts, keys, strict=True) if not store.check([key])]
    store.set("missing", json.dumps(missing))


def all_reduce(store: Store, node: int, hosts: Sequence[str], timeout_s: float) -> str | None:
    """The first sum over all nodes; what was wrong with it, if anything was."""
    timeout = timedelta(seconds=timeout_s)
    group = PrefixStore("group", store)
    try:
        dist.init_process_group("gloo", store=group, rank=node, world_size=len(hosts), timeout=timeout)
        numbers = torch.arange(4.0) + node
        dist.all_reduce(numbers)
        dist.destroy_process_group()
    except RuntimeError as error:
        return f"the first all-reduce failed on {hosts[node]}: {_first_line(error)}"
    expected = len(hosts) * torch.arange(4.0) + sum(range(len(hosts)))
    if not torch.equal(numbers, expected):
        return f"the first all-reduce gave {numbers.tolist()} on {hosts[node]}, and not {expected.tolist()}"
    _leave_together(store, node, range(len(hosts)))
    return None


def _leave_together(store: Store, node: int, nodes: Iterable[int]) -> None:
    """Node 0, whose store it is, goes last; who does not say goodbye has been heard all the same."""
    store.set(f"done/{node}", "")
    if node == 0:
        with suppress(RuntimeError):
            store.wait([f"done/{number}" for number in nodes], timedelta(seconds=_MARGIN_S))


def _first_line(error: BaseException) -> str:
    """Torch's errors go on with a stack."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfcheck", description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs that this node should have")
    parser.add_argument("--meet", metavar="ADDRESS:PORT", help="where node 0 listens; without it no all-reduce")
    parser.add_argument("--node", type=int, default=0, metavar="I", help="number of this node, from 0")
    parser.add_argument("--hosts", metavar="A,B,...", help="names of all nodes, by number")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for each wait (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
