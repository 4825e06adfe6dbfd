"""`wavefleet sweep RECIPE key=a,b,c key2=d,e --cluster P`: a run for every combination, each as `submit` makes it.

Runs are named by the values that differ. A combination that was submitted before is that run, whoever submitted it:
the same command again, with --list say, finds all of them and shows them with their best WER.
"""

import argparse
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from asr_train.config import Recipe
from asr_train.errors import EXIT_DONE, RecipeError, RunError, say
from asr_train.files import read_json
from asr_train.recipe import load_recipe, on_hub, recipe_hash, walk
from asr_train.run_dir import RunDir, read_metrics
from launch.jobs import submit
from launch.site.cluster import load_cluster, split_changes
from launch.site.cluster_config import Cluster
from launch.site.slurm import SlurmError
from launch.status import describe

_NAME_CHARACTERS = 100  # of the values in a folder's name; file systems take 255 bytes


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    recipe: Recipe
    values: dict[str, Any]  # of the keys that differ
    path: Path


@dataclass(frozen=True)
class Row:
    """How one run of a sweep is."""

    run: str
    values: dict[str, Any]
    state: str
    job_id: str | None
    step: int
    max_steps: int | None
    best_wer: float | None
    best_step: int | None
    set: str | None


def main(argv: Sequence[str]) -> int:
    """Submit what is not there yet, and list all runs."""
    options = _parser().parse_intermixed_args(argv)
    overrides, changes = split_changes(options.overrides)
    changes += [] if options.nodes is None else [f"nodes={options.nodes}"]
    if options.cluster is None and (options.dry_run or not options.list):
        raise RecipeError("--cluster: missing; or --list, to see the runs that there are")
    members, cluster = _checked(options, overrides, changes)
    if options.dry_run:
        without = submit.kept_off(_needed(cluster), options.cluster)
        for member in members:
            print(f"# {member.path}")
            print(submit.text(RunDir(member.path), member.recipe, _needed(cluster), exclude=without))
        return EXIT_DONE
    problems, fetched = {}, set[str]()
    if not options.list:
        for member in members:
            named = repr(on_hub(member.recipe))
            wishes = submit.Wishes(retry=options.retry, fetch=named not in fetched)
            try:
                if _submit(member, _needed(cluster), options.cluster, wishes):
                    fetched.add(named)
            except (RunError, SlurmError) as error:  # the others can do without it
                problems[member.path] = str(error)
    rows = sorted(map(_row, members), key=lambda row: (row.best_wer is None, row.best_wer))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    else:
        _print(rows)
    if problems:
        raise RunError("not submitted:" + "".join(f"\n  {path.name}: {text}" for path, text in problems.items()))
    return EXIT_DONE


def split_values(text: str) -> list[str]:
    """The values of `a,b,c`. A comma inside quotes or brackets does not split: `[0.1,0.9],"a,b"` is two values.

    Raises:
        RecipeError: a quote or bracket is left open, or a value between commas is empty.
    """
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and pieces[-1].rstrip()[-1:] in ("", *"[{,:"):  # an apostrophe in a word is none
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append("")
            continue
        pieces[-1] += character
    if quote or depth:
        raise RecipeError(f"{text!r}: {'a quote' if quote else 'a bracket'} is not closed")
    if len(pieces) > 1 and not all(piece.strip() for piece in pieces):
        raise RecipeError(f"{text!r}: nothing between two commas; '' is an empty text")
    return pieces


def combinations(recipe: str, overrides: Sequence[str]) -> list[Member]:
    """The runs of a sweep: every value of every key with every other; each run once.

    Raises:
        RecipeError: lists what is wrong with any of them.
    """
    choices: list[list[str]] = []
    problems: dict[str, None] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        try:
            choices.append([f"{key}{equals}{value}" for value in split_values(raw)])
        except RecipeError as error:
            problems[f"{key}: {error}"] = None
    varied = [group[0].partition("=")[0] for group in choices if len(group) > 1]
    members: dict[Path, Member] = {}
    for combination in [] if problems else itertools.product(*choices):
        try:
            found = load_recipe(recipe, combination)
        except RecipeError as error:
            problems[str(error)] = None
            continue
        if found.run_dir is not None:
            problems["run_dir: every run of a sweep has its own; set it to null"] = None
            continue
        values = _values(found, varied)
        path = _directory(found, values)
        members.setdefault(path, Member(replace(found, run_dir=str(path)), values, path))
    if problems:
        raise RecipeError("nothing was submitted:\n" + "\n".join(problems))
    return list(members.values())


def best_wer(run: RunDir, recipe: Recipe) -> tuple[str, float, int] | None:
    """Lowest WER of a run on the set that picks its best model: the set, the WER, the step; None before there is one.

    Without `eval.best` that is the recipe's first set.
    """
    name = recipe.eval.best.partition("/")[0] if recipe.eval.best else next(iter(recipe.eval.sets), None)
    scores = [(line["wer"], line["step"]) for line in read_metrics(run) if line.get("set") == name]
    if name is None or not scores:
        return None
    wer, step = min(scores)
    return name, wer, step


def _checked(
    options: argparse.Namespace, overrides: Sequence[str], changes: Sequence[str]
) -> tuple[list[Member], Cluster | None]:
    """The runs and the profile.

    Raises:
        RecipeError: lists what is wrong with any of them, before anything is submitted.
    """
    problems, members, cluster = [], [], None
    try:
        members = combinations(options.recipe, overrides)
    except RecipeError as error:
        problems.append(str(error))
    try:
        cluster = None if options.cluster is None else load_cluster(options.cluster, changes)
    except RecipeError as error:
        problems.append(str(error))
    for member in members if not problems else []:
        if cluster is None:
            break
        try:
            submit.check_size(member.recipe, cluster)
            submit.text(RunDir(member.path), member.recipe, cluster)
        except RecipeError as error:
            problems.append(f"{member.path.name}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    return members, cluster


def _submit(member: Member, cluster: Cluster, cluster_name: str, wishes: submit.Wishes) -> bool:
    """Submit a run that does not live and is not done; whether it has a job now."""
    run = RunDir(member.path)
    if run.done.exists():
        say(f"{run.path}: done already")
        return False
    say(submit.start(run, member.recipe, cluster, cluster_name, wishes))
    return True


def _needed(cluster: Cluster | None) -> Cluster:
    assert cluster is not None
    return cluster


def _values(recipe: Recipe, keys: Sequence[str]) -> dict[str, Any]:
    """What a recipe says at some keys; also inside of fields, `eval.sets.dev.split` say."""
    found = {}
    leaves = {key: value for key, value, _ in walk(recipe)}
    for key in keys:
        leaf = next((name for name in leaves if key == name or key.startswith(f"{name}.")), None)
        if leaf is None:  # a whole group
            found[key] = {name: value for name, value in leaves.items() if name.startswith(f"{key}.")}
            continue
        value = leaves[leaf]
        for part in key.removeprefix(leaf).split(".")[1:]:
            value = value[int(part)] if isinstance(value, list) and part.isdigit() else _member(value, part)
        found[key] = value
    return found


def _member(value: Any, part: str) -> Any:
    """A field of a nested value; a source that stands alone is a list of one."""
    inner = value[0] if isinstance(value, list) and len(value) == 1 else value
    return inner.get(part) if isinstance(inner, Mapping) else inner


def _directory(recipe: Recipe, values: Mapping[str, Any]) -> Path:
    """A run's directory: that of an earlier run of the same recipe, else one that is named by its values."""
    root, mark = Path.cwd() / "runs", recipe_hash(recipe)
    defining = {key for key, _, meta in walk(recipe) if meta["defines_run"]}
    if all(any(key == name or key.startswith(f"{name}.") for name in defining) for key in values):
        for path in sorted(root.glob(f"{recipe.name}-*{mark[:8]}/run.json")):
            if read_json(path)["recipe_hash"] == mark:
                return path.parent
    short = {key: key.rpartition(".")[2] for key in values}
    if len(set(short.values())) < len(short):
        short = {key: key for key in values}
    text = "-".join(f"{short[key]}={_compact(value)}" for key, value in values.items())
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)[:_NAME_CHARACTERS]
    return root / "-".join(filter(None, (recipe.name, text, mark[:8])))


def _compact(value: Any) -> str:
    """A value as it would stand in a recipe, on one line."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("...").strip()


def _row(member: Member) -> Row:
    run = RunDir(member.path)
    found = describe(run)
    best = best_wer(run, member.recipe)
    return Row(
        run=str(member.path),
        values=member.values,
        state=found["state"],
        job_id=found["job_id"],
        step=found["step"],
        max_steps=found["max_steps"],
        best_wer=None if best is None else best[1],
        best_step=None if best is None else best[2],
        set=None if best is None else best[0],
    )


def _print(rows: Sequence[Row]) -> None:
    keys = list(rows[0].values)
    table = Table(*keys, "best WER", "of step", "state", "job", "step", "run", box=None, pad_edge=False,
                  header_style="dim")  # fmt: skip
    for row in rows:
        wer = "" if row.best_wer is None else f"{row.best_wer:.2%} {row.set}"
        step = f"{row.step}/{row.max_steps}" if row.max_steps else str(row.step)
        cells = (wer, "" if row.best_step is None else str(row.best_step), row.state, row.job_id or "", step)
        table.add_row(*map(_compact, row.values.values()), *cells, Path(row.run).name)
    Console(width=None if Console().is_terminal else 240, markup=False, highlight=False).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value,value",
        help="recipe fields and their values; a comma in quotes or brackets does not part two of them. "
        "cluster.key=value is for the profile",
    )  # fmt: skip
    parser.add_argument("--cluster", metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes a run, in place of the profile's")
    parser.add_argument("--list", action="store_true", help="submit nothing, only list the runs")
    parser.add_argument("--retry", action="store_true", help="go on with runs whose last attempt failed")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch texts, and touch nothing")
    parser.add_argument("--json", action="store_true", help="list for programs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
