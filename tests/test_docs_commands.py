"""The commands of README and docs, run: each as it stands there, in a scratch folder, on small things of those names.

A recipe `minds14` in the working folder goes before the one that ships: it is that one, but for a tiny model, a few
synthetic utterances and few steps. So are the profile `generic`, the configs, and what `new` writes. Programs that
import torch are forked from this process, which has imported it: their main function is called with the words that the
command gives them.
What talks to a cluster talks to a real Slurm.
"""

import contextlib
import gc
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
import torch
import yaml
from conftest import RATE, TINY_MODEL, speech, write_jsonl, write_speech
from pages import COMMAND_PAGES, ROOT, Command, blocks, commands
from ranks import _forget_accelerate_state
from slurm_conf import NODES

import launch.child
import launch.local
from asr_train.data.sources import open_sources
from asr_train.errors import run_main
from asr_train.files import read_jsonl
from asr_train.recipe import decode_recipe, dump_recipe, load_recipe, to_values
from launch import cli, demo
from launch.node import devices

MAX_NOT_RUN = 12
RECIPES = ("demo", "minds14", "librispeech_100h")
SUBMITTED = "librispeech_100h"  # by the pages' commands for a cluster
TORCH_MAINS = {"asr_train": "asr_train.train"}  # `python -m asr_train` is a package's __main__
PROGRAMS = ("asr_train.train", "asr_train.evaluate", "asr_train.export", "asr_train.transcribe", "asr_train.samples")
NO_HUB = ("asr_train.new.unreachable", lambda model: "no hub in tests")

SHELL_BLOCKS = [block for page in COMMAND_PAGES for block in blocks(page) if block.language == "sh"]
YAML_BLOCKS = [block for page in COMMAND_PAGES for block in blocks(page) if block.language == "yaml"]


# --- programs, forked -------------------------------------------------------------------------------------------


def forked(program, folder, environ=None):
    """Exit code and output of a function that runs as a program would: a process of its own, in a folder."""
    out = folder / ".out"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        gc.freeze()
        try:
            with out.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(io.FileIO(number, "w"), "utf-8", write_through=True) for number in (1, 2)
            )
            os.chdir(folder)
            os.environ.update(environ or {})
            torch.set_num_threads(1)
            _forget_accelerate_state()
            code = program()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), out.read_text(encoding="utf-8", errors="replace")


def run_child_here(command, *, env=None, **others):
    """In place of `launch.child.run_child`: programs with torch in this process, all others as ever."""
    words = list(map(str, command))
    single = "accelerate.commands.launch" in words and words[words.index("--num_processes") + 1] == "1"
    if "accelerate.commands.launch" in words and not single:
        return launch.child.run_child.wrapped(command, env=env, **others)
    start = len(words) - words[::-1].index("-m") if single else words.index("-m") + 1
    module, arguments = words[start], words[start + 1 :]
    with mock.patch.dict(os.environ, dict(env or {})):
        program = importlib.import_module(TORCH_MAINS.get(module, module)).main
        code = program(arguments) if module == "launch.cli" else run_main(program, arguments)
    return launch.child.Ended(code, None)


run_child_here.wrapped = launch.child.run_child


@pytest.fixture(scope="module", autouse=True)
def programs_are_forked():
    for name in PROGRAMS:
        importlib.import_module(name)
    tiny.model()  # transformers imports the rest of itself when it is needed first
    with contextlib.ExitStack() as stack:
        for module in (launch.child, launch.local, demo):
            stack.enter_context(mock.patch.object(module, "run_child", run_child_here))
        stack.enter_context(mock.patch(*NO_HUB))
        yield


# --- the folders that commands run in ---------------------------------------------------------------------------


def write_texts(folder, manifest):
    """A manifest's recordings with their texts beside them."""
    for row in read_jsonl(manifest):
        source = manifest.parent / row["audio_filepath"]
        target = folder / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        target.with_suffix(".txt").write_text(row["text"] + "\n", encoding="utf-8")


def small(recipe, data, corpora):
    """A recipe's values with a tiny model, tiny data and few steps; all else is as it was."""
    values = to_values(recipe)
    sources = {part: {"kind": "jsonl", "path": str(data / part / "manifest.jsonl")} for part in ("train", "dev")}
    values["data"] |= {"train": sources["train"], "corpus_root": str(corpora), "num_proc": 1, "shard_rows": 10}
    values["text"] |= {"processor": None}
    values["model"] |= {"pretrained": None, "config": TINY_MODEL, "layerdrop": 0.0}
    values["eval"] |= {"sets": dict.fromkeys(values["eval"]["sets"], sources["dev"])}
    for group in ("eval", "checkpoint"):
        values[group] |= {"every": values[group]["every"] and "2"}
    size = {"unit_utterances": 4} if values["unit_utterances"] else {"unit_audio_s": 12.0}
    return values | size | {"max_steps": 4, "precision": "fp32", "num_workers": 0, "units_per_step": 2}


def write_small(path, recipe, data, corpora):
    path.write_text(dump_recipe(decode_recipe(small(recipe, data, corpora))), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_speech(folder / "train", 40, seed=1, name="train")
    write_speech(folder / "dev", 8, seed=2, name="dev")
    return folder


def make_world(folder, data, corpora):
    """What a reader has who has cloned the project and has recordings."""
    folder.mkdir()
    for name in RECIPES:
        write_small(folder / name, load_recipe(name), data, corpora)
    for block in YAML_BLOCKS:
        if named := re.match(r"# (\S+\.yaml)\n", block.text):
            write_small(folder / named[1], decode_recipe(yaml.safe_load(block.text)), data, corpora)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "accelerate_configs").mkdir()
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        (folder / "accelerate_configs" / path.name).write_text(yaml.safe_dump(values | {"num_processes": 2}))
    for name in ("recordings", "interviews"):
        write_texts(folder / name, data / "dev" / "manifest.jsonl")
    soundfile.write(folder / "interview.mp3", speech("one two", 2.0), RATE, format="MP3")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def machine(tmp_path_factory, data, corpora):
    """One machine, where `make demo` has been: its commands were run here, on less."""
    world = make_world(tmp_path_factory.mktemp("machine") / "wavefleet", data, corpora)
    with mock.patch.object(devices, "num_cores", lambda: 1), mock.patch.object(demo, "num_cores", lambda: 1):
        code, out = forked(lambda: run_main(demo.main, []), world)
    assert code == 0, out
    assert "Word error rates" in out and "transcribe" in out
    return world


@pytest.fixture(scope="module")
def cluster(slurm_session, tmp_path_factory, data, corpora):
    """A cluster's login node. The run that is stopped, looked at and cancelled would otherwise train for long."""
    world = make_world(tmp_path_factory.mktemp("cluster") / "wavefleet", data, corpora)
    long = ["max_steps=3000", "eval.every=null", "checkpoint.every=50", "log.every=1"]
    (world / SUBMITTED).write_text(dump_recipe(load_recipe(world / SUBMITTED, long)), encoding="utf-8")
    (world / "generic").write_text(
        "gpus_per_node: 0\ncpus_per_node: 1\ntime: 30\nsignal_lead_s: 30\nenvironment: {OMP_NUM_THREADS: 1}\n"
    )
    slurm_session.world = world
    yield slurm_session
    slurm_session.restore()


# --- the commands -----------------------------------------------------------------------------------------------


def with_names(world, text):
    """The names of runs in a page, `runs/mine-1a2b3c4d`, and of its one node, as they are here."""

    def here(found):
        paths = sorted((world / "runs").glob(f"{found[1]}-????????"), key=lambda path: path.stat().st_mtime)
        assert paths, f"no run {found[1]} yet: a command before this one should make it"
        return f"runs/{paths[0].name}"

    return re.sub(r"runs/([\w.]+)-[0-9a-f]{8}\b", here, text).replace("node017", NODES[-1])


def run(world, command, environ=None):
    """Run a command of a page; its output. Ours are called with the words that a shell would give them."""
    text = with_names(world, command.text)
    words = shlex.split(text)
    if words[0] == "wavefleet":
        code, out = forked(lambda: cli.main(words[1:]), world, environ)
    elif words[:2] == ["python", "-m"]:
        program = importlib.import_module(words[2]).main
        code, out = forked(lambda: run_main(program, words[3:]), world, environ)
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        one_cpu = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "PATH": path}
        done = subprocess.run(
            ["bash", "-c", text], cwd=world, env={**os.environ, **one_cpu, **(environ or {})}, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        code, out = done.returncode, done.stdout
    assert code == 0, f"{text}\nended with {code}:\n{out}"
    return out


def is_for_a_cluster(block):
    return "--cluster" in block.text


def has_run(machine, wants_ranks):
    return any((path / "logs").is_dir() or not wants_ranks for path in machine.glob("runs/minds14-*"))


seen: Counter[str] = Counter()


@pytest.mark.parametrize(
    "block", [block for block in SHELL_BLOCKS if not is_for_a_cluster(block)], ids=lambda block: block.name
)
def test_commands_for_one_machine(machine, data, corpora, block):
    for command in commands(block):
        if command.not_run is None and not seen[command.text]:  # the same command on another page is the same
            seen[command.text] += 1
            wants_ranks = "--rank" in block.text  # one process has no logs of ranks
            if "runs/minds14-" in command.text and not has_run(
                machine, wants_ranks
            ):  # as on its own, or of one process
                for path in machine.glob("runs/minds14-*"):
                    shutil.rmtree(path)
                ranks = " --processes 2" if wants_ranks else ""
                run(machine, Command(f"wavefleet train minds14{ranks}", None))
            if "--processes" in command.words or command.words[0] == "accelerate":  # from its beginning, not "done"
                for path in machine.glob("runs/minds14-*"):
                    shutil.rmtree(path)
            run(machine, command)
            if command.words[:2] == ["wavefleet", "new"]:
                written = machine / f"{command.words[2]}.yaml"
                write_small(written, load_recipe(written), data, corpora)


@pytest.mark.parametrize(
    "block", [block for block in SHELL_BLOCKS if is_for_a_cluster(block)], ids=lambda block: block.name
)
def test_commands_for_a_cluster(cluster, block):
    """A block begins without runs. A job is waited for, as a person would, where a command of the block wants it."""
    world = cluster.world
    environ = {**cluster.environ, "PYTHONPATH": str(ROOT)}
    try:
        for command in commands(block):
            if command.not_run is None:
                wait_until_it_makes_sense(cluster, command)
                assert run(world, command, environ).strip(), command.text
    finally:
        cluster.cancel_all()
        shutil.rmtree(world / "runs", ignore_errors=True)


def wait_until_it_makes_sense(cluster, command, timeout_s=300):
    """A training is read or stopped once it makes steps, scored once it has saved, explained once it is over."""
    verb = command.words[1]
    found = list((cluster.world / "runs").glob(f"{SUBMITTED}-????????"))
    waited_for = {"logs": "steps", "save": "steps", "stop": "steps", "why": "end", "submit": "end", "evaluate": "save"}
    if not found or verb not in waited_for:
        return
    until = time.monotonic() + timeout_s
    while not has(found[0], waited_for[verb]) or (verb == "submit" and cluster.run("squeue", "--noheader").strip()):
        assert time.monotonic() < until, f"{command.text}: {sorted(found[0].iterdir())}"
        time.sleep(0.5)


def has(path, what):
    """Whether a run has made steps, saved, or ended."""
    if what == "end":
        return (path / "verdicts.jsonl").exists()
    if what == "save":
        return bool(list(path.glob("checkpoints/step-*")))
    metrics = path / "metrics.jsonl"
    return metrics.exists() and sum("loss" in line for line in read_jsonl(metrics)) >= 2


def test_what_is_not_run_is_little_and_says_why():
    found = [command for block in SHELL_BLOCKS for command in commands(block)]
    are_run = {command.text for command in found if command.not_run is None}
    reasons = {command.text: command.not_run for command in found if command.text not in are_run}
    print("\nnot run:", *(f"  {text}: {reason}" for text, reason in reasons.items()), sep="\n")
    assert len(reasons) <= MAX_NOT_RUN, reasons


# --- the examples of recipes ------------------------------------------------------------------------------------


@pytest.fixture
def trees(tmp_path, data, monkeypatch):
    """What the examples of docs/data.md read, where they read it."""
    manifest = data / "dev" / "manifest.jsonl"
    rows = list(read_jsonl(manifest))
    write_texts(tmp_path / "recordings", manifest)
    write_texts(tmp_path / "calls", manifest)
    paths = [f"calls/{row['audio_filepath']}" for row in rows]
    texts = [row["text"] for row in rows]
    lines = [f'{path},"{text}"\n' for path, text in zip(paths, texts, strict=True)]
    (tmp_path / "calls.csv").write_text("path,sentence\n" + "".join(lines), encoding="utf-8")
    segment = {"offset": 0.1, "duration": 0.2}
    segments = [{"audio_filepath": path, "text": text, **segment} for path, text in zip(paths, texts, strict=True)]
    write_jsonl(tmp_path / "calls.jsonl", segments)
    audio = [{"bytes": (tmp_path / path).read_bytes(), "path": path} for path in paths]
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"audio": audio, "sentence": texts}), tmp_path / "shards" / "train-0.parquet")
    for split in ("train-clean-100", "train-clean-360", "dev-other"):
        folder = tmp_path / "LibriSpeech" / split / "1" / "2"
        folder.mkdir(parents=True)
        (folder / "1-2-0000.flac").write_bytes(b"")
        (folder / "1-2.trans.txt").write_text("1-2-0000 ONE TWO\n")
    (tmp_path / "cv-corpus" / "tr" / "clips").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / "cv-corpus" / "tr" / f"{split}.tsv").write_text("path\tsentence\na.mp3\tbir\n")
    monkeypatch.chdir(tmp_path)


def is_example(block):
    return set(yaml.safe_load(block.text)) <= {"data", "eval"}


@pytest.mark.parametrize("block", list(filter(is_example, YAML_BLOCKS)), ids=lambda block: block.name)
def test_examples_of_sources_find_their_rows(trees, block):
    """Every one but the hub's, which the tests of sources play."""
    recipe = decode_recipe({"name": "example", "max_steps": 1, **yaml.safe_load(block.text)})
    for sources in (recipe.data.train, *recipe.eval.sets.values()):
        if all(source.kind != "hub" for source in sources):
            assert sum(map(len, open_sources(sources))) >= 1


def test_there_is_an_example_of_every_kind_of_source():
    examples = [yaml.safe_load(block.text) for block in YAML_BLOCKS if is_example(block)]
    trains = [example["data"]["train"] for example in examples]
    kinds = {source["kind"] for train in trains for source in (train if isinstance(train, list) else [train])}
    assert kinds >= {"hub", "parquet", "csv", "jsonl", "audio_folder", "librispeech", "common_voice", "demo"}


@pytest.mark.parametrize(
    "block", [block for block in YAML_BLOCKS if not is_example(block)], ids=lambda block: block.name
)
def test_other_yaml_is_a_recipe_or_a_part_of_a_profile(block, tmp_path):
    from launch.site.cluster import load_cluster  # noqa: PLC0415

    values = yaml.safe_load(block.text)
    if "name" in values:
        decode_recipe(values)
    else:
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump({"gpus_per_node": 1, "cpus_per_node": 1, "time": 10, **values}))
        load_cluster(path)
