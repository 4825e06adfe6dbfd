"""A run's files as plain values: its lines, attempts and verdicts, sorted into what a report shows."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from asr_train.config import Recipe
from asr_train.errors import RecipeError, RunError
from asr_train.files import read_json
from asr_train.recipe import decode_recipe, to_values, walk
from asr_train.run_dir import RunDir, kept_lines


@dataclass(frozen=True, kw_only=True)
class Record:
    """What stands in the files of one run.

    Attributes:
        identity: run.json.
        values: the recipe's fields, nested, as recipe.yaml has them.
        recipe: the same, checked; None where this version cannot read it, `recipe_problem` says why.
        lines: every line of metrics.jsonl that can be read, in its order.
        num_torn: lines that cannot.
        done: done.json; empty while the run is not finished.
    """

    run: RunDir
    identity: Mapping[str, Any]
    values: Mapping[str, Any]
    recipe: Recipe | None
    recipe_problem: str
    lines: tuple[dict[str, Any], ...]
    num_torn: int
    done: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run directory's name, which tells runs of one recipe apart."""
        return self.run.path.name

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The training lines that count: of each step the last attempt that made it, if the run went on from there."""
        return [line for line in kept_lines(self.lines) if "loss" in line]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation lines that count."""
        return [line for line in kept_lines(self.lines) if "set" in line]

    @property
    def set_names(self) -> list[str]:
        """Sets that were scored, in the order in which they first were."""
        return list(dict.fromkeys(line["set"] for line in self.evaluations))

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Event lines of some kinds, of all attempts."""
        return [line for line in self.lines if line.get("event") in names]

    @cached_property
    def first_lines(self) -> dict[int, dict[str, Any]]:
        """Attempt -> the line that it began with: device, strategy, steps an epoch, hashes of corpus and plan."""
        return {line["attempt"]: line for line in self.events("started", "restored") if "attempt" in line}

    def latest(self, key: str) -> Any:
        """A value of the newest attempt's first line, or of the last one that has it; None in runs of old versions."""
        return next(
            (line[key] for line in reversed(list(self.first_lines.values())) if line.get(key) is not None), None
        )

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Dotted key -> value of every field of the recipe."""
        if self.recipe is None:
            return _flat(self.values)
        return {key: value for key, value, _ in walk(self.recipe)}

    @cached_property
    def set_fields(self) -> dict[str, Any]:
        """The fields that are not at their defaults; all of them where the recipe is of another version."""
        if self.recipe is None:
            return self.fields
        least = {"name": self.recipe.name, "max_steps": 1, "data": {"train": self.values["data"]["train"]}}
        defaults = {key: value for key, value, _ in walk(decode_recipe(least))}
        always = ("name", "data.train")
        return {key: value for key, value in self.fields.items() if key in always or value != defaults[key]}


def read_record(run: RunDir) -> Record:
    """Read a run.

    Raises:
        RunError: it was never started, so that there is nothing to show; or run.json cannot be read.
    """
    lines, num_torn = _read_lines(run.metrics)
    if not lines and not run.newest_attempt():
        raise RunError(f"{run.path} has not been started yet: there is nothing to report")
    try:
        identity = read_json(run.path / "run.json")
    except ValueError as error:
        raise RunError(f"{run.path / 'run.json'} is damaged: {error}") from None
    recipe, problem, values = None, "", {}
    try:
        recipe = run.recipe()
        values = to_values(recipe)
    except (RecipeError, RunError) as error:
        problem = str(error)
        values = _raw_values(run.path / "recipe.yaml")
    done = {}
    with suppress(OSError, ValueError):
        done = read_json(run.done)
    return Record(
        run=run, identity=identity, values=values, recipe=recipe, recipe_problem=problem, lines=tuple(lines),
        num_torn=num_torn, done=done,
    )  # fmt: skip


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of metrics.jsonl that name a step, and how many lines of it are torn."""
    lines: list[dict[str, Any]] = []
    num_torn = 0
    if path.exists():
        with path.open("rb") as stream:
            for raw in stream:
                record = None
                with suppress(ValueError):
                    record = json.loads(raw)
                if not isinstance(record, dict):
                    num_torn += bool(raw.strip())
                elif "step" in record:
                    lines.append(record)
    return lines, num_torn


def _raw_values(path: Path) -> dict[str, Any]:
    """The recipe of another version, unchecked; empty where it is no YAML at all."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
