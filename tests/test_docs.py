"""README and docs say what is there: files, links, verbs, recipes, fields. Their commands: test_docs_commands.py."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from pages import COMMAND_PAGES, PAGES, ROOT, blocks, commands, links

from asr_train import errors, resources
from asr_train.data.audio import MISSING_FILE, OUTSIDE
from asr_train.recipe import load_recipe, walk
from launch import cli, local, plan
from launch.jobs import prepare_array, submit, sweep
from launch.site.cluster import load_cluster, split_changes

LANGUAGES = {"sh", "text", "yaml", "json", "python"}


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


# --- the site ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as `make docs` builds them: any link or anchor among them that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp("site")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\t\$\(BIN\)/python (-m sphinx .*)$", makefile, re.MULTILINE)
    words = [str(folder) if word == "build/docs/html" else word for word in command.split()]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_pages_are_built_without_a_warning_and_the_first_one_is_found(site):
    assert "docs/index.html" in (site / "index.html").read_text(encoding="utf-8")
    built = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    assert {page.relative_to(ROOT) for page in PAGES} <= built


def test_a_translated_page_goes_from_right_to_left_and_its_commands_do_not(site):
    page = (site / "docs" / "ar" / "quickstart.html").read_text(encoding="utf-8")
    assert re.search(r'<html [^>]*lang="ar" dir="rtl"', page)
    assert 'dir="rtl"' not in (site / "docs" / "quickstart.html").read_text(encoding="utf-8")
    style = (site / "_static" / "wavefleet.css").read_text(encoding="utf-8")
    rule = next(rule for rule in style.split("}") if '[dir="rtl"] pre' in rule)
    assert "direction: ltr" in rule


def test_nothing_on_a_page_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        fetched = re.findall(
            r"<(?:script|img|iframe)[^>]* src=\"([^\"]+)|<link[^>]* rel=\"stylesheet\"[^>]* href=\"([^\"]+)", page
        )
        assert [found for pair in fetched for found in pair if found.startswith(("http", "//"))] == [], path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files here; anchors are the site's to check. Addresses elsewhere are only read: nothing reaches the network."""
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            assert parts.scheme == "https" and "." in parts.netloc and " " not in link, link
        elif parts.path:
            assert (page.parent / parts.path).exists(), link


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_says_its_language(page):
    assert [block.name for block in blocks(page) if block.language not in LANGUAGES] == []


def test_the_translation_has_the_commands_and_the_recipe_of_the_original():
    original, translation = ROOT / "docs" / "quickstart.md", ROOT / "docs" / "ar" / "quickstart.md"

    def shell(page):
        return [command for block in blocks(page) if block.language == "sh" for command in commands(block)]

    def recipes(page):
        return [yaml.safe_load(block.text) for block in blocks(page) if block.language == "yaml"]

    assert shell(translation) == shell(original)
    assert recipes(translation) == recipes(original)


# --- what follows from the code ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says(generate):
    for name, text in generate.pages().items():
        written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
        assert written == text, f"run python docs/generate.py: {name}"


def test_the_reference_has_every_field_and_every_verb(generate):
    pages = generate.pages()
    keys = {key for key, _, _ in walk(load_recipe("demo"))}
    assert keys == set(
        re.findall(r"^\| `([a-z0-9_.]+)` \|", pages["recipe.md"].partition("## Sources")[0], re.MULTILINE)
    )
    assert "| `optim.betas` | number from 0 to 1, number from 0 to 1 | `[0.9, 0.98]` |" in pages["recipe.md"]
    assert re.findall(r"^## (\w+)$", pages["verbs.md"], re.MULTILINE) == list(cli.VERBS)
    assert "| `--processes N` | processes on this machine, or on each node |" in pages["verbs.md"]


def test_every_exit_code_has_a_meaning():
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_") and isinstance(value, int)}
    assert set(errors.EXIT_MEANINGS) == codes


def test_a_page_that_is_not_what_the_code_says_is_told(generate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main(["--check"]) == 4
    assert "recipe.md: not what the code says" in capsys.readouterr().out
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_every_reason_for_a_refusal_is_on_the_page_of_data():
    raised = {MISSING_FILE, OUTSIDE}
    for name in ("data/audio.py", "data/shards.py", "data/tables.py", "data/rows.py"):
        source = ast.parse((ROOT / "asr_train" / name).read_text(encoding="utf-8"))
        for node in ast.walk(source):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")).endswith(
                "Error"
            ):
                if len(node.args) == 2 and isinstance(node.args[0], ast.Constant):
                    raised.add(node.args[0].value)
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "reason":
                raised |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)} - {
                    "lost sync"
                }
    assert len(raised) >= 12
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Refusals")[2]
    assert set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) == raised


# --- what commands and fields name ------------------------------------------------------------------------------


def command_words(program):
    """(page, words) of every command that runs a program."""
    for page in COMMAND_PAGES:
        for block in blocks(page):
            if block.language == "sh":
                yield from ((page, found.words) for found in commands(block) if found.words[0] == program)


def is_own(recipe):
    """A recipe that the page itself has the reader write."""
    return recipe.endswith(".yaml")


def test_every_wavefleet_command_is_one():
    """Verbs exist, options are known, recipes and profiles load as the reader has them, and go together."""
    found = list(command_words("wavefleet"))
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
            overrides, changes = split_changes(options.overrides)
            members = sweep.combinations(options.recipe, overrides)
            assert len(members) > 1
            if options.cluster is not None:
                submit.check_size(members[0].recipe, load_cluster(options.cluster, changes))
        elif verb in ("show", "prepare", "train"):
            options = local._parser().parse_intermixed_args(rest)
            if not is_own(options.recipe):
                load_recipe(options.recipe, options.overrides)
        if verb in ("submit", "plan"):
            options = {"submit": submit, "plan": plan}[verb]._parser().parse_intermixed_args(rest)
            overrides, changes = submit.split_overrides(options)
            if verb == "submit" or options.cluster is not None:
                submit.check_size(load_recipe(options.recipe, overrides), load_cluster(options.cluster, changes))


def test_every_accelerate_command_names_a_config_and_a_recipe():
    found = list(command_words("accelerate"))
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
        for name in re.findall(r"`([a-z_]+\.[a-z_]+)(?:[=:][^`]*)?`", page.read_text(encoding="utf-8")):
            if name.partition(".")[0] in groups and not name.endswith((".py", ".yaml", ".jsonl", ".txt")):
                assert name in known, f"{page.name}: {name}"


def test_shipped_recipes_and_configs_are_described():
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    configs = (ROOT / "docs" / "multi-gpu.md").read_text(encoding="utf-8")
    assert [name for name in resources.shipped("recipes") if f"| `{name}` |" not in recipes] == []
    assert [name for name in resources.shipped("accelerate_configs") if f"`{name}`" not in configs] == []
