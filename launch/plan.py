"""`wavefleet plan RECIPE`: what a training would be, before anything starts; with --cluster, what its job would be too.

Steps, padding, balance, memory, time, checkpoints; the batch text, the command and the environment of every node, what
a job would cost, and when Slurm would start it. Nothing is fetched, written or submitted.
"""

import argparse
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import asr_train
from asr_train import pace, resources
from asr_train.config import Recipe
from asr_train.errors import EXIT_DONE, CorpusError, RecipeError, RunError, WavefleetError
from asr_train.files import write_text
from asr_train.pace import Pace
from asr_train.recipe import load_recipe, on_hub, read_values, run_directory
from asr_train.run_dir import RunDir
from launch.jobs.submit import check_size, code_of, kept_off, split_overrides, text
from launch.node.placement import Placement, Rendezvous
from launch.node_agent import training_environment
from launch.runs import open_run
from launch.site import signal_lead, slurm
from launch.site.cluster import accelerate_config, environment, load_cluster
from launch.site.cluster_config import Cluster
from launch.site.findings import continuation, findings
from launch.site.sbatch import python_command
from launch.site.slurm import SlurmError

_START = "<job id>.0"
_ADDRESS, _PORT = "<address of node 0>", "<free port of node 0>"


def main(argv: Sequence[str]) -> int:
    """Print what a training, and its job, would be."""
    options = _parser().parse_intermixed_args(argv)
    overrides, changes = split_overrides(options)
    recipe = load_recipe(options.recipe, overrides)
    if options.cluster is None:
        if changes:
            raise RecipeError(f"{changes[0]}: is a cluster's; name its profile with --cluster")
        found = {"run_dir": str(run_directory(recipe)), **_training(recipe, options, None)}
    else:
        if options.processes or options.accelerate:
            raise RecipeError("--processes, --accelerate: with --cluster the profile says them; see cluster.key=value")
        cluster = load_cluster(options.cluster, changes)
        check_size(recipe, cluster)
        found = {**plan(recipe, cluster, options.cluster), **_training_of_job(recipe, options, cluster)}
    if options.html is not None:
        _write_page(options.html, recipe.name, found)
    elif options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    return EXIT_DONE


def _write_page(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """The plan as a page; says where it is."""
    from launch.report.page import size  # noqa: PLC0415 - they need plotly
    from launch.report.plan_page import plan_page  # noqa: PLC0415

    if found["training"] is None:
        raise CorpusError(f"--html: no page without the training: {found['training_problem']}")
    write_text(path, plan_page(name, found))
    print(f"{path} ({size(path.stat().st_size)})")


def _training(recipe: Recipe, options: argparse.Namespace, cluster: Cluster | None) -> dict[str, Any]:
    """The training half, as plain values."""
    # they need numpy and pyarrow; `--help` does not
    from launch import plan_cost, plan_place, plan_training  # noqa: PLC0415

    name = [] if options.name is None else [f"name={options.name}"]
    changes = [word for word in options.overrides if not word.startswith("cluster.")]
    words = shlex.join([options.recipe, *changes, *name])
    if cluster is None:
        place = plan_place.here(options.processes, options.accelerate, options.gpu)
    else:
        place = plan_place.on(cluster, options.gpu)
    planned = plan_training.plan_training(recipe, place, words, _measured_pace(recipe, options))
    values = planned.to_json()
    if cluster is None:
        return {"training": values, "cost": plan_cost.cost(planned.forecast, place)}
    cost, warnings = plan_cost.cost_of_jobs(planned.forecast, place, cluster)
    return {"training": {**values, "warnings": values["warnings"] + warnings}, "cost": cost}


def _measured_pace(recipe: Recipe, options: argparse.Namespace) -> Callable[[Recipe], Pace | None]:
    """Where a measured pace is from: a run that was named, 20 steps here, or this very run, as far as it is."""
    if options.like is not None:
        run = open_run(options.like)

        def of_that_run(recipe: Recipe) -> Pace:
            if (found := pace.of_run(run)) is None:
                raise RunError(f"--like: nothing was measured in {run.path} yet: it has too few steps, or no ledger")
            return found

        return of_that_run
    if options.measure:
        from launch.measure_pace import measured  # noqa: PLC0415 - for this alone

        # with a cluster's profile too: a process of this machine says what one there would take, if it is like this
        return lambda recipe: measured(recipe, accelerate=options.accelerate, processes=options.processes)
    own = RunDir(run_directory(recipe))
    return lambda _: pace.of_run(own) if options.gpu is None and own.metrics.exists() else None


def _training_of_job(recipe: Recipe, options: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    """The training half beside a job; where it cannot be told, why, for the job is known all the same."""
    try:
        return {**_training(recipe, options, cluster), "training_problem": None}
    except WavefleetError as error:
        return {"training": None, "cost": None, "training_problem": str(error)}


def plan(recipe: Recipe, cluster: Cluster, cluster_name: str) -> dict[str, Any]:
    """What a job would be, as plain values."""
    run = RunDir(run_directory(recipe))
    without = kept_off(cluster, cluster_name)
    batch_text = text(run, recipe, cluster, exclude=without)
    start, start_problem = None, None
    try:
        start = slurm.expected_start(batch_text)
    except SlurmError as error:
        start_problem = str(error)
    hours = cluster.time / 60
    times = signal_lead.measured(run)
    models, sources = on_hub(recipe)
    names = [*models, *(source.dataset for source in sources)]
    return {
        "run_dir": str(run.path),
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "world_size": cluster.nodes * cluster.num_processes,
        "time_min": cluster.time,
        "node_hours": cluster.nodes * hours,
        "gpu_hours": cluster.nodes * cluster.gpus_per_node * hours,
        "kept_off": without,
        "expected_start": start,
        "start_problem": start_problem,
        "continuation": continuation(cluster, findings(cluster, cluster_name)),
        "signal_lead_s": cluster.signal_lead_s,
        "signal_lead_needed_s": None if times is None else times.needed_s,
        "signal_lead_problem": signal_lead.problem_of(run, cluster.signal_lead_s),
        "cache": cluster.cache,
        "fetched_first": list(dict.fromkeys(names)) if cluster.cache else [],
        "commands": [_command(run, cluster, node) for node in range(cluster.nodes)],
        "sbatch": batch_text,
    }


def _command(run: RunDir, cluster: Cluster, node: int) -> dict[str, Any]:
    """What the node agent of one node would start; what is known in the job alone stands in angle brackets."""
    code = code_of(run)
    placement = _placement(cluster, code)
    address = "127.0.0.1" if cluster.nodes == 1 else _ADDRESS
    meet = Rendezvous(cluster.nodes, node, address, 0, _START)
    logs = run.path / "logs" / _START / f"node-{node}"
    arguments = [str(run.path / "recipe.yaml"), f"run_dir={run.path}"]
    argv = placement.command(arguments, rendezvous=meet, log_dir=logs)
    argv[argv.index("--main_process_port") + 1] = _PORT
    argv[:1] = [shlex.split(python_command(cluster))[-1]]
    ours = {**environment(cluster), "PYTHONPATH": str(code), **training_environment(cluster, _START)}
    return {"node": node, "environment": dict(sorted(placement.environ(ours).items())), "argv": argv}


def _placement(cluster: Cluster, code: Path) -> Placement:
    """What a node of this profile would choose by itself."""
    config = resources.find("accelerate_configs", accelerate_config(cluster)).absolute()
    root = Path(asr_train.__file__).parent.parent
    inherited = {**os.environ, **environment(cluster)}
    threads = inherited.get("OMP_NUM_THREADS", "")
    return Placement(
        config=code / config.relative_to(root) if config.is_relative_to(root) else config,
        num_processes=cluster.num_processes,
        num_threads=int(threads) if threads.isdigit() else max(1, cluster.cpus_per_node // cluster.num_processes),
        on_cpu=bool(read_values(config).get("use_cpu")),
    )


def _print(found: Mapping[str, Any]) -> None:
    from launch import plan_text  # noqa: PLC0415

    width = plan_text.columns()
    print(f"run directory  {found['run_dir']}")
    if found["training"] is not None:
        for line in plan_text.training_lines(found, width):
            print(line)
    else:
        print(f"training       not known: {found['training_problem']}")
    if "sbatch" in found:
        print()
        _print_job(found)


def _print_job(found: Mapping[str, Any]) -> None:
    gpus = f"{_count(found['gpus_per_node'], 'GPU')} each, " if found["gpus_per_node"] else ""
    processes = _count(found["world_size"], "process", "processes")
    print(f"a job          {_count(found['nodes'], 'node')}, {gpus}{processes} in all, {found['time_min']} minutes")
    print(f"at most        {found['gpu_hours']:,.1f} GPU-hours, {found['node_hours']:,.1f} node-hours a job")
    if found["kept_off"]:
        print(f"kept off       {', '.join(found['kept_off'])}; `wavefleet nodes` says why")
    start = found["expected_start"] or f"unknown: {found['start_problem']}"
    print("start          " + start.replace("\n", "\n" + 15 * " "))
    print(f"goes on by     {found['continuation']}")
    print(f"signal lead    {_lead(found)}")
    if found["fetched_first"]:
        print(f"fetched first  {', '.join(found['fetched_first'])}, into {found['cache']}")
    for command in found["commands"]:
        print(
            f"\nnode {command['node']}, besides the environment of your shell and of the batch script's set-up lines:"
        )
        for name, value in command["environment"].items():
            print(f"  {name}={shlex.quote(value)}")
        print(f"  {shlex.join(command['argv'])}")
    print(f"\nbatch script:\n{found['sbatch']}", end="")


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _lead(found: Mapping[str, Any]) -> str:
    if found["signal_lead_problem"]:
        return f"too short: {found['signal_lead_problem']}"
    needed_s = found["signal_lead_needed_s"]
    known = "nothing of this run was measured yet" if needed_s is None else f"this run needs up to {needed_s} s"
    return f"{found['signal_lead_s']} s before the time limit; {known}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe fields to change; cluster.key=value for the profile's"
    )
    parser.add_argument("--processes", type=_number, metavar="N", help="processes; what this machine would start")
    parser.add_argument("--accelerate", metavar="FILE", help="accelerate config: a file, or a shipped one by name")
    parser.add_argument("--gpu", metavar="NAME", help="GPU that memory and time are for, A100-80GB say")
    measure = parser.add_mutually_exclusive_group()
    measure.add_argument("--like", metavar="RUN", help="as fast as this run was: a directory, or its name in runs/")
    measure.add_argument("--measure", action="store_true", help="train 20 steps on this machine, and throw them away")
    parser.add_argument("--cluster", metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes, in place of the profile's")
    parser.add_argument("--name", metavar="S", help="the name of run and corpus, in place of the recipe's")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="for programs")
    output.add_argument("--html", type=Path, metavar="FILE", help="a page that opens offline, with charts")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: should be at least 1")
    return number
