"""Imports point one way: wavefleet -> launch -> layer 0 of asr_train <- everything else in it; no layer looks up."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "datasets", "accelerate", "evaluate", "deepspeed"}

# A new module is placed here, as low as its imports let it be. Layer 0 has no torch; `launch` may use it and no other.
LAYERS = (
    """__init__ verbosity arguments disk trouble
    config errors files geometry lock recipe resources run_dir state checkpoints stop
    phase ledger run_ledger pace estimate memory_estimate auto_unit gpus
    balance forecast forecast_warnings
    captions windows data.__init__ data.text data.lengths data.shapes data.permute data.world_size
    data.plan data.audio data.corpus""",
    """progress prometheus peer_wait metrics memory_error loss optim safe_load generators conv_layout
    data.rows data.manifests data.hub data.tables data.folders data.demo_grammar data.demo data.telephone
    data.sources data.find_source data.look
    data.shards data.shard_pool data.summary data.finish data.stage
    data.spec_augment data.batch data.loader""",
    """model_config model_facts chunked_encoder speech_model model compiling trackers strategy unit_probe live_state
    checkpoint restore score""",
    """job training_log loop prepare prepare_share fetch samples new_file new train trained selfcheck eval_data evaluate
    model_card export transcribe __main__""",
)
LAYER_OF = {
    f"asr_train.{name}".removesuffix(".__init__"): level for level, names in enumerate(LAYERS) for name in names.split()
}


def modules(package):
    """Module name -> its syntax tree."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if "metric_modules" not in name:  # programs for the `evaluate` library, loaded by path
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


TREES = {**modules("asr_train"), **modules("launch"), **modules("wavefleet")}


def imports(name):
    """Every module that a module names in an import statement, in functions too, but not only for type checking."""
    tree = TREES[name]
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; write it in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in TREES else node.module


def test_every_module_has_a_layer():
    assert sorted(name for name in TREES if name.startswith("asr_train") and name not in LAYER_OF) == []


@pytest.mark.parametrize("name", [name for name in TREES if name in LAYER_OF])
def test_no_module_imports_a_higher_layer(name):
    higher = {used for used in imports(name) if LAYER_OF.get(used, 0) > LAYER_OF[name]}
    assert higher == set()


@pytest.mark.parametrize("name", [name for name, level in LAYER_OF.items() if level == 0 and name in TREES])
def test_layer_0_is_free_of_torch(name):
    assert {used.partition(".")[0] for used in imports(name)} & (HEAVY | {"submitit"}) == set()


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("asr_train")])
def test_the_training_program_knows_nothing_of_the_launcher(name):
    assert {used.partition(".")[0] for used in imports(name)} & {"launch", "submitit"} == set()


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("launch")])
def test_the_launcher_uses_layer_0_and_no_torch(name):
    used = set(imports(name))
    assert {module.partition(".")[0] for module in used} & HEAVY == set()
    assert {module for module in used if LAYER_OF.get(module, 0) > 0} == set()


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("wavefleet")])
def test_the_functions_for_notebooks_are_on_top(name):
    assert {used.partition(".")[0] for used in imports(name)} & {"wavefleet"} == set()


def test_no_circles():
    graph = {name: {used for used in imports(name) if used in TREES and used != name} for name in TREES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_a_fresh_process_that_loads_the_launcher_and_layer_0_has_no_torch():
    names = [name for name in TREES if name.startswith(("launch", "wavefleet")) or LAYER_OF.get(name) == 0]
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted(set(sys.modules) & set(json.loads(sys.argv[2])))))"
    )
    command = [sys.executable, "-c", program, json.dumps(names), json.dumps(sorted(HEAVY | {"submitit"}))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


# Folders of `launch`, each of which knows those before it; verbs and what all share stand above and beside them.
FLOORS = ("site", "node", "ending", "jobs")


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("launch.")])
def test_no_folder_of_the_launcher_imports_a_later_one(name):
    def floor(module):
        folder = module.removeprefix("launch.").partition(".")[0]
        return FLOORS.index(folder) if folder in FLOORS else -1

    here = floor(name)
    assert here == -1 or {used for used in imports(name) if used.startswith("launch.") and floor(used) > here} == set()
