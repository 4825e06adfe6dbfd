"""Before a training starts: may it start on this node? All that is wrong at once, in sentences that say what to do.

Every node checks itself and starts `asr_train.selfcheck`, which imports torch and meets the other nodes. What it finds
it writes to `preflight-N.json` in the folder where the agents of a job meet; node 0 reads them all and writes what it
decides to `preflight.json`. When one may not start, all know within a moment, and none waits for a collective that
never comes.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from asr_train.files import read_json, write_json
from asr_train.run_dir import RunDir
from launch.child import at_start
from launch.node.node_check import Preflight, Wanted, check_node, last_lines

MEET_S = 120.0  # torch may come from a slow file server on one node and not on the other
_MARGIN_S = 60.0
_GRACE_S = 15.0  # after one node lost another: for all to say so, for then it is the one that they have in common
_POLL_S = 0.2
_DECISION = "preflight.json"
_Child = Callable[[], Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which node of which job this is.

    Attributes:
        folder: where the agents of the job meet.
        node: its number.
        hosts: names of all, by number.
        meet: `ADDRESS:PORT` of node 0.
    """

    folder: Path
    node: int
    hosts: Sequence[str]
    meet: str

    @property
    def host(self) -> str:
        """This node's name."""
        return self.hosts[self.node]


def check(
    run: RunDir,
    place: Place,
    wanted: Wanted,
    *,
    environ: Mapping[str, str] = os.environ,
    is_asked: Callable[[], bool] = lambda: False,
    timeout_s: float = MEET_S,
) -> dict[str, Preflight]:
    """Check this node, and wait for what the others find.

    Args:
        run: what is to be trained.
        place: which node this is.
        wanted: what it should have.
        environ: of the training.
        is_asked: whether the job is asked to end meanwhile.
        timeout_s: for the nodes to meet.

    Returns:
        Host -> what was found there, of the nodes that have said anything. Training may start when `may_start` says so.
    """
    needs_torch = len(place.hosts) > 1 or wanted.num_gpus > 0
    child = _selfcheck(place, wanted.num_gpus, environ, timeout_s) if needs_torch else nullcontext(lambda: None)
    with child as said:
        mine = check_node(run, place.host, wanted, environ)
        mine = replace(mine, is_final=not (needs_torch and mine.is_well))
        _write(place, mine)
        wait = _Decider(place) if place.node == 0 else _Follower(place)
        until = time.monotonic() + timeout_s + wait.margin_s
        while not wait.is_over():
            if is_asked():
                break
            if time.monotonic() > min(until, wait.until):
                mine = wait.without_answer(mine)
                break
            if not mine.is_final and (result := said()) is not None:
                mine = _with_result(mine, result)
                _write(place, mine)
            time.sleep(_POLL_S)
    return wait.end(mine)


class _Decider:
    """Node 0: reads what all nodes say, and decides. If all of them did, that would be too much for a file server."""

    def __init__(self, place: Place) -> None:
        self.margin_s = _MARGIN_S
        self._place = place
        self._found: dict[str, Preflight] = {}
        self.until = math.inf

    def is_over(self) -> bool:
        """Whether all nodes have said their last word, or one need not wait for more: a node cannot train."""
        hosts, found = self._place.hosts, self._found
        for number, host in enumerate(hosts):
            if host not in found or not found[host].is_final:
                with suppress(OSError):  # not there yet
                    found[host] = _preflight(read_json(_file(self._place, number)))
        if self.until == math.inf and any(node.unreached or node.network for node in found.values()):
            self.until = time.monotonic() + _GRACE_S
        is_complete = len(found) == len(hosts) and all(node.is_final for node in found.values())
        return is_complete or any(node.problem or node.hardware for node in found.values())

    def without_answer(self, mine: Preflight) -> Preflight:
        """Its word when the time is up; nothing is held against it for the silence of others."""
        mute = [host for host in self._place.hosts if host not in self._found or not self._found[host].is_final]
        text = f"no word from {', '.join(mute)} in the check of the nodes"
        return replace(mine, network=mine.network or text, is_final=True)

    def end(self, mine: Preflight) -> dict[str, Preflight]:
        """The decision, which the others read."""
        decided = judged({**self._found, self._place.host: mine}, self._place.hosts)
        write_json(self._place.folder / _DECISION, {host: asdict(node) for host, node in decided.items()})
        return decided


class _Follower:
    """Every other node: waits for the decision."""

    until = math.inf

    def __init__(self, place: Place) -> None:
        self.margin_s = 2 * _MARGIN_S  # node 0 waits, too
        self._place = place
        self._decided: dict[str, Preflight] = {}

    def is_over(self) -> bool:
        """Whether node 0 has decided."""
        with suppress(OSError):  # not there yet
            content = read_json(self._place.folder / _DECISION)
            self._decided = {host: _preflight(values) for host, values in content.items()}
        return bool(self._decided)

    def without_answer(self, mine: Preflight) -> Preflight:
        """Its word when the time is up."""
        text = f"no word from {self._place.hosts[0]} in the check of the nodes"
        return replace(mine, network=mine.network or text, is_final=True)

    def end(self, mine: Preflight) -> dict[str, Preflight]:
        """The decision, or what is known without."""
        return {self._place.host: mine, **self._decided}


def may_start(found: Mapping[str, Preflight], hosts: Sequence[str]) -> bool:
    """Whether all nodes are there and well."""
    return all(host in found and found[host].is_final and found[host].is_well for host in hosts)


def judged(found: Mapping[str, Preflight], hosts: Sequence[str]) -> dict[str, Preflight]:
    """What every node found, held against the others: who differs from them, and who is to blame for a lost connection.

    A node that does not reach node 0 has a problem; where none of several does, node 0 has.
    """
    differing = differences({host: node.facts for host, node in found.items()}) if len(found) == len(hosts) else {}
    result = {host: _joined(node, differing.get(host)) for host, node in found.items()}
    lost = [host for host, node in found.items() if node.unreached]
    others = hosts[1:]
    if len(others) > 1 and lost == list(others) and hosts[0] in found:
        what = f"none of {', '.join(others)} reached it: {found[others[0]].unreached}"
        result[hosts[0]] = _joined(result[hosts[0]], what)
    else:
        result |= {host: _joined(result[host], found[host].unreached) for host in lost}
    return {host: replace(node, unreached=None) for host, node in result.items()}


def differences(facts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Host -> in what it differs from most of the nodes; from the first of them where there are as many of each."""
    problems: dict[str, list[str]] = {}
    names = dict.fromkeys(name for values in facts.values() for name in values)
    for name in names:
        values = {host: found.get(name, "missing") for host, found in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # the first of equals
        others = ", ".join(host for host, value in values.items() if value == usual)
        for host, value in values.items():
            if value != usual:
                problems.setdefault(host, []).append(f"{name} is {value}, and {usual} on {others}")
    return {host: f"{'; '.join(texts)}: all nodes need the same" for host, texts in problems.items()}


def _joined(node: Preflight, problem: str | None) -> Preflight:
    return replace(node, problem="; ".join(text for text in (node.problem, problem) if text) or None)


def _write(place: Place, mine: Preflight) -> None:
    write_json(_file(place, place.node), asdict(mine))


def _preflight(content: Mapping[str, Any]) -> Preflight:
    """What a node wrote; it may run other code, which is among what is looked for."""
    known = {entry.name for entry in fields(Preflight)}
    return Preflight(**{name: value for name, value in content.items() if name in known})


def _file(place: Place, number: int) -> Path:
    return place.folder / f"preflight-{number}.json"


@contextmanager
def _selfcheck(place: Place, num_gpus: int, environ: Mapping[str, str], timeout_s: float) -> Iterator[_Child]:
    """`asr_train.selfcheck` as a child, which ends with us; gives what it found, once it has ended."""
    command = [sys.executable, "-m", "asr_train.selfcheck", "--gpus", str(num_gpus), "--timeout", f"{timeout_s:g}"]
    if len(place.hosts) > 1:
        command += ["--meet", place.meet, "--node", str(place.node), "--hosts", ",".join(place.hosts)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**environ, "TORCH_CPP_LOG_LEVEL": "FATAL"},  # it says the same thing in thirty lines
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=at_start(shielded=True),  # noqa: PLW1509 - this program has one thread
        )
        try:
            yield lambda: None if process.poll() is None else _said(process.returncode, output)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _said(code: int, output: IO[bytes]) -> Mapping[str, Any]:
    """The last line of a selfcheck that has ended."""
    with suppress(ValueError):
        found = json.loads(last_lines(output, most=1))
        if isinstance(found, dict):
            return found
    return {"problems": [f"its check in torch ended with {code}: {last_lines(output) or 'it printed nothing'}"]}


def _with_result(mine: Preflight, said: Mapping[str, Any]) -> Preflight:
    """What this node found, with what torch found."""
    missing = said.get("missing") or ()
    network = said.get("network")
    if missing:
        network = f"no word from {', '.join(missing)} before the first all-reduce"
    problem = "; ".join(said.get("problems") or ()) or None
    return replace(mine, problem=problem, unreached=said.get("unreached"), network=network, is_final=True)
