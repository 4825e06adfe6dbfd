"""Reading a recipe: YAML and `key.sub=value` in, a checked `Recipe` or all its errors at once out."""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from asr_train import resources
from asr_train.config import DemoSource, FolderSource, HubSource, Recipe, TableSource
from asr_train.errors import RecipeError
from asr_train.files import hash_json
from asr_train.state import higher_is_better

_Settings = TypeVar("_Settings")
_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
_UNION_TAGS = {tag for kind in (HubSource, TableSource, FolderSource, DemoSource)
               for tag in get_args(get_type_hints(kind)["kind"])}  # fmt: skip


def load_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """Read a recipe and apply changes.

    Relative paths in it become absolute, from the working directory, so that every later process agrees.

    Args:
        recipe: a file, a shipped recipe by name, plain values as a file holds them, or a recipe.
        overrides: `key.sub=value` words, the values being YAML; or dotted keys and their values.

    Raises:
        RecipeError: lists every problem: dotted key, value, what was expected, and the nearest known key.
    """
    where, values = _find(recipe)
    words = [_word(key, value) for key, value in overrides.items()] if isinstance(overrides, Mapping) else overrides
    problems = [problem for text in words if (problem := override(values, text))]
    return decode_recipe(values, where=where, problems=problems)


def _find(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> tuple[str, dict[str, Any]]:
    """What to call a recipe, and its plain values, which may be changed."""
    if isinstance(recipe, Recipe):
        return recipe.name, to_values(recipe)
    if isinstance(recipe, Mapping):
        return "recipe", {key: _plain(value) for key, value in recipe.items()}
    try:
        path = resources.find("recipes", os.fspath(recipe))
    except FileNotFoundError as error:
        raise RecipeError(str(error)) from None
    return str(path), read_values(path)


def _word(key: str, value: Any) -> str:
    """A change as `key.sub=value`."""
    text = yaml.safe_dump(
        _plain(value), default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf")
    )
    return f"{key}=" + text.removesuffix("\n").removesuffix("...").rstrip()


def read_resolved(path: Path) -> Recipe:
    """Read a recipe that this program wrote: of a run directory, or of a model folder.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return decode_recipe(read_values(path), where=str(path))


class _Loader(yaml.SafeLoader):
    """YAML without its tags for Python objects, and without keys that stand twice, of which PyYAML drops the first.

    And without numbers to base 60 or 8, which nobody means: 12:00:00 and 007 are text, not 43200 and 7.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} stands here twice", key.start_mark)
                seen.add(key.value)
        return node

    def construct_decimal(self, node: Any) -> int | str:
        text = str(self.construct_scalar(node))
        if ":" in text or re.match(r"[-+]?0[0-9_]", text):
            return text
        return int(self.construct_yaml_int(node))

    def construct_fraction(self, node: Any) -> float | str:
        text = str(self.construct_scalar(node))
        return text if ":" in text else float(self.construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_fraction)


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a recipe or profile file.

    Raises:
        RecipeError: it is no text, no YAML, or something else than `key: value` lines.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def decode_recipe(values: Mapping[str, Any], where: str = "recipe", problems: Sequence[str] = ()) -> Recipe:
    """Check plain values and make a recipe of them; see `load_recipe`."""
    return _absolute(decode(_RECIPE, Recipe, values, where, problems, _contradictions))


def decode(
    adapter: TypeAdapter[_Settings],
    kind: type,
    values: Mapping[str, Any],
    where: str,
    problems: Sequence[str],
    contradictions: Callable[[_Settings], list[str]],
) -> _Settings:
    """Check plain values and make frozen settings of them: a recipe, or a cluster profile.

    Args:
        adapter: pydantic's, of the dataclass.
        kind: the dataclass.
        values: what a YAML file holds.
        where: file that the message names.
        problems: what was found wrong before.
        contradictions: finds values that are each right and together wrong.

    Raises:
        RecipeError: lists every problem at once.
    """
    found = list(problems)
    try:
        settings = adapter.validate_python(dict(values))
    except ValidationError as error:
        found += [_explain(dict(detail), kind) for detail in error.errors(include_url=False)]
    else:
        found += contradictions(settings)
        if not found:
            return settings
    listed = "".join(f"\n  {problem}" for problem in found)
    raise RecipeError(f"{where}: {len(found)} error{'s' if len(found) > 1 else ''}{listed}")


def to_values(recipe: Any) -> dict[str, Any]:
    """A recipe, or a group of it, as plain values: what `resolved recipe` files hold."""
    return {key: _plain(value) for key, value in asdict(recipe).items()}


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(to_values(recipe), sort_keys=False, allow_unicode=True)


def identity(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of every field that defines the run: data, plan, model, optimizer."""
    return {key: value for key, value, meta in walk(recipe) if meta["defines_run"]}


def recipe_hash(recipe: Recipe) -> str:
    """Hash, in hex, of what defines the run."""
    return hash_json(identity(recipe))


def run_directory(recipe: Recipe) -> Path:
    """The run's directory: `run_dir`, or runs/<name>-<first 8 digits of the hash>."""
    if recipe.run_dir is not None:
        return Path(recipe.run_dir)
    return Path.cwd() / "runs" / f"{recipe.name}-{recipe_hash(recipe)[:8]}"


def walk(group: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Every leaf field: its dotted key, its plain value, and its metadata (`meaning`, `defines_run`)."""
    for entry in fields(group):
        value = getattr(group, entry.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", _plain(value), entry.metadata


def parse_cadence(cadence: str | None) -> tuple[int, str] | None:
    """`"500"` -> (500, "steps"); `"2 epochs"` -> (2, "epochs"); None stays None."""
    if cadence is None:
        return None
    number, _, unit = cadence.partition(" ")
    return int(number), "epochs" if unit else "steps"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def override(values: dict[str, Any], text: str) -> str | None:
    """Apply one `key.sub=value` in place; what is wrong with it, or None."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return f"{text!r}: expected key=value, as in optim.lr=1e-5"
    try:
        value = yaml.load(raw, Loader=_Loader) if raw else None  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return f"{key}: {raw!r} is not a YAML value"
    *groups, last = key.split(".")
    target: Any = values
    for depth, group in enumerate(groups):
        if isinstance(target, list):
            if not group.isdigit() or int(group) >= len(target):
                return f"{key}: {'.'.join(groups[:depth])} is a list of {len(target)}; name one by its number, from 0"
            target = target[int(group)]
            continue
        if target.get(group) is None:
            target[group] = {}
        target = target[group]
        if not isinstance(target, (dict, list)):
            return f"{key}: {'.'.join(groups[: depth + 1])} is a value, it has no keys"
    if isinstance(target, list):
        return f"{key}: name one of the list by its number, as in {'.'.join(groups)}.0.{last}"
    target[last] = value
    return None


def _explain(detail: dict[str, Any], kind: type) -> str:
    """One pydantic error as: dotted key, value, what was expected, nearest known key."""
    location = [item for item in detail["loc"] if item not in _UNION_TAGS]
    key = ".".join(str(item) for item in location)
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(kind, location[:-1], detail["loc"])
        prefix = "".join(f"{item}." for item in location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{key}: no such field; {hint}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; it has no default"
    if detail["type"] == "union_tag_not_found":
        return f"{key}.kind: missing; expected one of {', '.join(sorted(_UNION_TAGS))}"
    if detail["type"] == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        near = difflib.get_close_matches(str(tag), _UNION_TAGS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}.kind: {tag!r}: expected one of {', '.join(sorted(_UNION_TAGS))}{hint}"
    expected = re.sub(r"^(Input|String|Value) should", "should", str(detail["msg"]))
    if key.endswith(".every") and "pattern" in expected:
        expected = "should be a number of steps, or `1 epoch`, `2 epochs`"
    return f"{key}: {detail['input']!r}: {expected}"


def _known_keys(root: type, location: Sequence[Any], raw_location: Sequence[Any]) -> list[str]:
    """Names of the fields of the group that a dotted location leads to."""
    tag = next((item for item in raw_location if item in _UNION_TAGS), None)
    for source in (HubSource, TableSource, FolderSource, DemoSource):
        if tag is not None and tag in get_args(get_type_hints(source)["kind"]):
            return [entry.name for entry in fields(source)]
    group: Any = root
    for item in location:
        group = get_type_hints(group).get(str(item), group)
    return [entry.name for entry in fields(group)] if is_dataclass(group) else []


def _contradictions(recipe: Recipe) -> list[str]:
    """Values that are each right and together wrong."""
    found = []
    if (recipe.max_steps is None) == (recipe.max_epochs is None):
        found.append("max_steps, max_epochs: give exactly one of the two")
    if not recipe.data.train:
        found.append("data.train: needs at least one source")
    if recipe.order != "cost" and recipe.unit_utterances is None:
        found.append(f"order: {recipe.order!r} takes a fixed count of utterances a unit; set unit_utterances")
    if recipe.order == "cost" and recipe.unit_utterances is not None:
        found.append("unit_utterances: order 'cost' sizes units by unit_audio_s; choose order grouped or random")
    if recipe.order != "cost" and recipe.unit_audio_s == "auto":
        found.append(f"unit_audio_s: 'auto': order {recipe.order!r} sizes units by unit_utterances; give a number")
    if recipe.data.min_duration_s >= recipe.data.max_duration_s:
        found.append(f"data.min_duration_s: {recipe.data.min_duration_s}: should be under data.max_duration_s")
    if abs(sum(recipe.optim.tri_stage) - 1) > 1e-6:
        found.append(f"optim.tri_stage: {list(recipe.optim.tri_stage)}: the three shares should add up to 1")
    if len(recipe.text.remove) != len(set(recipe.text.remove)):
        found.append(f"text.remove: {recipe.text.remove!r}: a character stands twice; give characters, no pattern")
    return found + _eval_contradictions(recipe)


def _best_contradictions(recipe: Recipe) -> list[str]:
    """What is wrong with `eval.best`, as far as can be known before metrics are loaded."""
    if recipe.eval.best is None:
        return []
    set_name, _, metric = recipe.eval.best.partition("/")
    own = ("wer", "cer", "wer_raw", "cer_raw")
    if set_name not in recipe.eval.sets:
        known = ", ".join(recipe.eval.sets)
        return [f"eval.best: {recipe.eval.best!r}: expected SET/METRIC with a set of: {known}"]
    if metric not in own and not recipe.eval.metrics:
        return [f"eval.best: {recipe.eval.best!r}: expected SET/METRIC with a metric of: {', '.join(own)}"]
    if higher_is_better(metric) is None and recipe.eval.higher_is_better is None:
        return [f"eval.higher_is_better: missing; whether more of {metric!r} is better is not known here"]
    return []


def _eval_contradictions(recipe: Recipe) -> list[str]:
    found = []
    if recipe.eval.metrics and not recipe.trust_remote_code:
        named = ", ".join(recipe.eval.metrics)
        found.append(f"eval.metrics: {named}: metrics are programs; set trust_remote_code: true")
    found += _best_contradictions(recipe)
    for where, cadence in (("eval.early_stopping", recipe.eval.early_stopping), ("eval.every", recipe.eval.every)):
        if cadence is not None and not recipe.eval.sets:
            found.append(f"{where}: needs at least one set in eval.sets")
    if recipe.eval.early_stopping is not None and recipe.eval.every is None:
        found.append("eval.early_stopping: needs eval.every")
    return found


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with its relative paths made absolute."""

    def full(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    def folder_or_hub(name: str | None) -> str | None:
        return full(name) if name is not None and Path(name).expanduser().exists() else name

    def local(sources: Sequence[Any]) -> tuple[Any, ...]:
        made = []
        for source in sources:
            changes = {key: full(value) for key in ("path", "audio_root") if (value := getattr(source, key, None))}
            made.append(replace(source, **changes))
        return tuple(made)

    data = replace(recipe.data, train=local(recipe.data.train), corpus_root=full(recipe.data.corpus_root))
    return replace(
        recipe,
        run_dir=None if recipe.run_dir is None else full(recipe.run_dir),
        data=data,
        text=replace(recipe.text, processor=folder_or_hub(recipe.text.processor)),
        model=replace(
            recipe.model,
            pretrained=folder_or_hub(recipe.model.pretrained),
            init_from=None if recipe.model.init_from is None else full(recipe.model.init_from),
        ),
        eval=replace(recipe.eval, sets={name: local(sources) for name, sources in recipe.eval.sets.items()}),
    )


def on_hub(recipe: Recipe) -> tuple[list[str], list[HubSource]]:
    """Models and processors, and data sets, that a recipe names on the hub and not in a folder on this machine."""
    models = dict.fromkeys(name for name in (recipe.model.pretrained, recipe.text.processor) if name is not None)
    sources = [source for group in (recipe.data.train, *recipe.eval.sets.values()) for source in group]
    return (
        [name for name in models if not Path(name).is_dir()],
        [source for source in sources if isinstance(source, HubSource) and not Path(source.dataset).is_dir()],
    )
