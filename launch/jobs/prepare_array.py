"""`wavefleet prepare RECIPE --cluster P --tasks N`: a corpus prepared by a job array, then made whole by one more job.

What is to be done is found out here, by `python -m asr_train.prepare_share --begin`; a task is one share of the shards.
The last job is the ordinary `python -m asr_train.prepare`, which finds all shards there. It waits for all tasks to end
well; where one does not, the same command does again what is missing, and nothing else.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from asr_train.config import Recipe
from asr_train.errors import EXIT_DONE, RecipeError, say
from asr_train.files import write_text
from asr_train.recipe import dump_recipe, load_recipe
from launch.jobs import job
from launch.jobs.job import Command
from launch.site import hub_cache, snapshot
from launch.site.cluster import load_cluster, site_folder, split_changes
from launch.site.cluster_config import Cluster
from launch.site.hub_cache import online

_MERGE = "merge"


def main(argv: Sequence[str]) -> int:
    """Submit what is missing of a corpus, or say who prepares it already."""
    options = _parser().parse_intermixed_args(argv)
    overrides, changes = split_changes(options.overrides)
    if options.tasks < 1:
        raise RecipeError(f"--tasks {options.tasks}: should be at least 1")
    recipe = load_recipe(options.recipe, overrides)
    cluster = job.on_one_node(load_cluster(options.cluster, changes), changes, num_gpus=0)
    if not any(text.startswith("data.num_proc=") for text in overrides):  # a task has its CPUs for itself
        recipe = replace(recipe, data=replace(recipe.data, num_proc=cluster.cpus_per_node))
    site = site_folder(cluster, options.cluster)
    if options.dry_run:
        _dry_run(recipe, cluster, site, options.tasks)
        return EXIT_DONE
    arguments = [options.recipe, *overrides]
    hub_cache.fill(arguments, recipe, cluster)
    exit_code, found = _begin(arguments, options.tasks, online(cluster))
    if exit_code != EXIT_DONE:
        return exit_code
    corpus, folder = Path(found["corpus"]), _folder(Path(found["corpus"]))
    if found["state"] == "complete":
        print(f"already prepared: {corpus}")
        return EXIT_DONE
    with job.submitting(folder, cluster):
        if states := job.live(folder):
            failed = [command.name for command in job.commands(folder) if job.ended(folder, command.name)]
            more = f"; failed so far: {', '.join(failed)}" if failed else ""
            print(f"{corpus} is being prepared: {job.shown(states)}{more}")
        elif found["state"] == "busy":
            print(f"{corpus} is being prepared by {found['who']}")
        else:
            _submit(recipe, cluster, site, corpus, found["pending"], options.tasks)
    return EXIT_DONE


def _submit(recipe: Recipe, cluster: Cluster, site: Path, corpus: Path, pending: Sequence[int], num_tasks: int) -> None:
    """Submit the shares that are pending, and what makes a corpus of them."""
    folder = _folder(corpus)
    for number in range(1, num_tasks + 1):
        if job.ended(folder, name := _share_name(number, num_tasks)):
            say(f"task {number} of {num_tasks} failed: {job.last_words(folder, name)}")
    if not pending and job.ended(folder, _MERGE):
        say(f"the corpus could not be made whole: {job.last_words(folder, _MERGE)}")
    recipe_file = folder / "recipe.yaml"
    write_text(recipe_file, dump_recipe(recipe))
    shares = [
        Command(name, "asr_train.prepare_share", (str(recipe_file), f"--share={number}/{num_tasks}"))
        for number in pending
        for name in [_share_name(number, num_tasks)]
    ]
    merge = Command(_MERGE, "asr_train.prepare", (str(recipe_file),))
    code = snapshot.take(folder / "code")
    job.write_job(folder, cluster, site, code, f"prepare {recipe.name}", [*shares, merge])
    arrays = job.hold(folder, [job.task(folder, share.name) for share in shares]) if shares else []
    try:
        after = f"afterok:{':'.join(arrays)}" if arrays else None
        last = job.hold(folder, [job.task(folder, _MERGE)], after=after)
    except BaseException:
        job.drop(arrays)
        raise
    job.release(folder, [*arrays, *last])
    tasks = f"{len(shares)} of {num_tasks} tasks as job {', '.join(arrays)}, then " if shares else ""
    print(f"{corpus}: {tasks}made whole by job {last[0]}; what they say is in {folder}")


def _begin(arguments: Sequence[str], num_tasks: int, environ: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    """Exit code and answer of the program that lists the sources; it says what is wrong itself."""
    command = [sys.executable, "-m", "asr_train.prepare_share", *arguments, f"--begin={num_tasks}"]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.returncode == EXIT_DONE else {}


def _dry_run(recipe: Recipe, cluster: Cluster, site: Path, num_tasks: int) -> None:
    """Print the batch texts; the corpus has its real name only when its model is known, which takes seconds."""
    folder = _folder(Path(recipe.data.corpus_root) / f"{recipe.name}-HASH")
    name = f"prepare {recipe.name}"
    print(job.batch_text(cluster, site, folder, name, num_tasks=num_tasks))
    print(f"# and when all of these have ended well:\n{job.batch_text(cluster, site, folder, name)}", end="")


def _folder(corpus: Path) -> Path:
    """The job folder of a corpus, beside it."""
    return corpus.with_name(f"{corpus.name}.jobs")


def _share_name(number: int, num_tasks: int) -> str:
    return f"share-{number}-of-{num_tasks}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wavefleet prepare", description="Prepare the corpus of a recipe as a job array.", allow_abbrev=False
    )
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe fields to change; cluster.key=value for the profile's"
    )
    parser.add_argument("--cluster", required=True, metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--tasks", type=int, required=True, metavar="N", help="how many tasks share the work")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch text, and touch nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
