"""README and docs say what is there: files, links, verbs, recipes, commands."""

import re
import shlex
from pathlib import Path

import pytest

from asr_train import resources
from asr_train.recipe import load_recipe, walk
from launch import cli, local, plan, prepare_array, submit, sweep
from launch.cluster import load_cluster, split_changes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def tree_of_readme():
    """Paths of the files and folders in README's layout, from its indentation."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").partition("asr_train/  ")[2].partition("```")[0]
    folders = {}
    for line in ("asr_train/  " + lines).splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"[\w.]+\.py\b|[\w]+/", line)
        for name in names if depth else names[:1]:
            parent = folders.get(depth - 1, Path()) if depth else Path()
            if name.endswith("/"):
                folders[depth] = parent / name
            yield parent / name


def test_the_layout_names_every_module_and_none_that_is_not_there():
    named = {path for path in tree_of_readme() if path.suffix == ".py"}
    there = {
        path.relative_to(ROOT)
        for package in ("asr_train", "launch")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py") and "metric_modules" not in path.parts
    }
    assert named == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def commands(program):
    """(page, words) of every line of a code block that runs a program."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                if line.startswith(f"{program} "):
                    yield page, shlex.split(line, comments=True)


def test_every_wavefleet_command_is_one():
    found = list(commands("wavefleet"))
    assert len(found) >= 5
    for page, (_, verb, *rest) in found:
        assert verb in cli.VERBS, page
        if verb == "prepare" and "--cluster" in rest:
            options = prepare_array._parser().parse_intermixed_args(rest)
            overrides, changes = split_changes(options.overrides)
            load_recipe(options.recipe, overrides)
            load_cluster(options.cluster, changes)
        elif verb == "sweep":
            options = sweep._parser().parse_intermixed_args(rest)
            assert len(sweep.combinations(options.recipe, split_changes(options.overrides)[0])) > 1
        elif verb in ("show", "prepare", "train"):
            options = local._parser().parse_intermixed_args(rest)
            load_recipe(options.recipe, options.overrides)
        if verb in ("submit", "plan"):
            options = {"submit": submit, "plan": plan}[verb]._parser().parse_intermixed_args(rest)
            overrides, changes = submit.split_overrides(options)
            load_recipe(options.recipe, overrides)
            load_cluster(options.cluster, changes)


def test_every_accelerate_command_names_a_config_and_a_recipe():
    found = list(commands("accelerate"))
    assert found
    for _, words in found:
        config = Path(words[words.index("--config_file") + 1])
        assert (ROOT / config).is_file()
        load_recipe(words[words.index("asr_train") + 1])


def test_fields_that_pages_name_exist():
    """`group.field` in code style; the groups are the recipe's."""
    recipe = load_recipe("demo")
    known = {key for key, _, _ in walk(recipe)}
    groups = {key.partition(".")[0] for key in known if "." in key}
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
            if name.partition(".")[0] in groups and not name.endswith((".py", ".yaml", ".jsonl", ".txt")):
                assert name in known, f"{page.name}: {name}"


def test_shipped_recipes_and_configs_are_described():
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert [name for name in resources.shipped("recipes") if f"| `{name}` |" not in recipes] == []
    assert [name for name in resources.shipped("accelerate_configs") if f"`{name}`" not in training] == []
