"""`wavefleet doctor --cluster P`: what a cluster can do, found by asking and by a short job, and what it means."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from asr_train.errors import EXIT_DONE, EXIT_FAILED, RecipeError
from asr_train.run_dir import RunDir
from launch.jobs.submit import submissions
from launch.site import probe_job, signal_lead, slurm, slurm_facts
from launch.site.cluster import load_cluster, site_folder
from launch.site.cluster_config import Cluster
from launch.site.diagnosis import Remark, diagnose
from launch.site.findings import Findings, continuation, findings, keep, to_json
from launch.site.sbatch import python_command, sbatch_text, submitit_parameters
from launch.site.signal_lead import Times
from launch.site.slurm import SlurmError

_TIMEOUT_S = 300


def main(argv: Sequence[str]) -> int:
    """Look at a cluster; 0, or 4 when no run of this profile could work there."""
    options = _parser().parse_args(argv)
    cluster = load_cluster(options.cluster)
    found = look(cluster, options.cluster, timeout_s=None if options.no_job else options.timeout)
    remarks = diagnose(cluster, found, slowest_run(options.cluster))
    can_run = all(remark.level != "cannot run" for remark in remarks)
    if options.json:
        content = {
            "can_run": can_run,
            "continuation": continuation(cluster, found),
            "remarks": [asdict(remark) for remark in remarks],
            "findings": to_json(found),
        }
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print(remarks)
    return EXIT_DONE if can_run else EXIT_FAILED


def look(cluster: Cluster, name: str, *, timeout_s: float | None) -> Findings:
    """Ask Slurm, have a job look around on a node, and write down what was found.

    Args:
        cluster: the profile.
        name: its name, or path.
        timeout_s: how long the job may take; None for no job: then what an earlier one found stays.

    Raises:
        SlurmError: Slurm is not here, or does not answer.
        RecipeError: the site's folder cannot be written.
    """
    facts = slurm_facts.ask(cluster)
    refused, start = None, None
    try:
        start = slurm.expected_start(_job_text(cluster, site_folder(cluster, name).absolute()))
    except SlurmError as error:
        refused = str(error)
    looked = probe_job.Looked(None) if timeout_s is None else probe_job.look(cluster, name, timeout_s)
    earlier = findings(cluster, name)
    found = Findings(
        time=time.time(),
        slurm=facts,
        refused=refused,
        expected_start=start,
        node=looked.node or (None if earlier is None else earlier.node),
        node_problem=looked.problem,
        cannot_run=looked.cannot_run,
    )
    try:
        keep(cluster, name, found)
    except OSError as error:
        raise RecipeError(f"shared: {site_folder(cluster, name)} cannot be written: {error}; name another") from None
    return found


def slowest_run(cluster: str, folder: Path = Path("runs")) -> tuple[str, Times] | None:
    """Of a cluster's runs in runs/, the one that needs most time from a warning to a checkpoint."""
    measured = []
    for path in folder.glob("*/run.json"):
        run = RunDir(path.parent)
        jobs = submissions(run)
        if jobs and Path(jobs[-1].cluster).stem == Path(cluster).stem and (times := signal_lead.measured(run)):
            measured.append((run.path.name, times))
    return max(measured, key=lambda entry: entry[1].needed_s, default=None)


def _job_text(cluster: Cluster, folder: Path) -> str:
    """A training's job, for Slurm to say whether it would take it."""
    parameters = submitit_parameters(cluster, job_name="wavefleet-doctor", nodes=cluster.nodes, hold=False)
    return sbatch_text(parameters, folder, python_command(cluster))


def _print(remarks: Sequence[Remark]) -> None:
    about = max(len(remark.about) for remark in remarks)
    for remark in remarks:
        lines = remark.text.replace("\n", "\n" + " " * (about + 14))
        print(f"{remark.level:<11} {remark.about:<{about}}  {lines}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--cluster", required=True, metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--no-job", action="store_true", help="ask Slurm alone; what an earlier job found stays")
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, metavar="S", help="seconds the job may take (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
