"""`wavefleet nodes --cluster P`: which nodes jobs are kept off, why and until when; add one, or take one back."""

import argparse
import difflib
import getpass
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asr_train.errors import EXIT_DONE, RecipeError, say
from launch.site import exclusions, slurm
from launch.site.cluster import load_cluster, site_folder
from launch.site.exclusions import ExcludedNode
from launch.site.slurm import SlurmError


def main(argv: Sequence[str]) -> int:
    """List, add or remove excluded nodes."""
    options = _parser().parse_args(argv)
    _check(options)
    site = site_folder(load_cluster(options.cluster), options.cluster)
    states = _states()
    for host in options.remove:
        if not exclusions.remove(site, host):
            raise RecipeError(f"{host} is not excluded; excluded are: {_names(exclusions.live(site)) or 'none'}")
    added = [_by_hand(host, options, states) for host in options.add]
    for node in added:  # a person's word counts, also when it is shorter
        exclusions.remove(site, node.host)
    exclusions.add(site, added)
    _show(exclusions.live(site), states or {}, site, as_json=options.json)
    return EXIT_DONE


def _check(options: argparse.Namespace) -> None:
    if options.add and not (options.reason or "").strip():
        raise RecipeError("--add needs --reason TEXT: who finds the node excluded wants to know why")
    if not options.add and (options.reason is not None or options.duration is not None):
        raise RecipeError("--reason and --for go with --add HOST")


def _by_hand(host: str, options: argparse.Namespace, states: Mapping[str, str] | None) -> ExcludedNode:
    """A node that a person excludes; refused where Slurm knows none of that name."""
    if states is not None and host not in states:
        near = difflib.get_close_matches(host, states, n=1)
        raise RecipeError(f"Slurm knows no node {host}{f'; did you mean {near[0]}?' if near else ''}")
    now = time.time()
    return ExcludedNode(
        host=host,
        since=now,
        until=now + exclusions.seconds(options.duration or "24h"),
        reason=options.reason,
        evidence=(f"excluded by {getpass.getuser()}",),
    )


def _states() -> dict[str, str] | None:
    """What Slurm says of its nodes; None where it says nothing."""
    try:
        return slurm.node_states()
    except SlurmError as error:
        say(f"Slurm's own states of the nodes are not known: {error}")
        return None


def _show(excluded: Sequence[ExcludedNode], states: Mapping[str, str], site: Path, *, as_json: bool) -> None:
    if as_json:
        rows = [{**asdict(node), "slurm": states.get(node.host)} for node in excluded]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not excluded:
        print(f"no node is excluded ({site})")
        return
    table = Table("node", "until", "Slurm", "why", "run", box=None, pad_edge=False, header_style="dim")
    for node in excluded:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(node.until))
        run = Path(node.run).name if node.run else "by hand"
        table.add_row(node.host, until, states.get(node.host, ""), node.reason, run)
        for text in node.evidence:
            if text != node.reason:
                table.add_row("", "", "", f"  {text}", "")
    Console(width=None if Console().is_terminal else 200, markup=False).print(table)


def _names(excluded: Sequence[ExcludedNode]) -> str:
    return ", ".join(node.host for node in excluded)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet nodes", description=__doc__, allow_abbrev=False)
    parser.add_argument("--cluster", required=True, metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--add", action="append", default=[], metavar="HOST", help="keep jobs off this node")
    parser.add_argument("--reason", metavar="TEXT", help="why, for those who find it excluded")
    parser.add_argument("--for", dest="duration", metavar="TIME", help="how long: 30m, 24h, 7d; 24h if not given")
    parser.add_argument("--remove", action="append", default=[], metavar="HOST", help="take this node back")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
