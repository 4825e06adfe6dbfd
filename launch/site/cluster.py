"""Reading a cluster profile, what a site's Slurm wants to be told: a checked `Cluster`, or all its errors at once.

`sbatch.py` turns it into a job; the node agents read the checked profile from the run directory.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from asr_train import resources
from asr_train.errors import RecipeError
from asr_train.recipe import decode, override, read_values
from launch.site.cluster_config import Cluster, ContainerSettings, as_list

FOLDER = "slurm/clusters"

_FLAG = re.compile(r"--([a-z][a-z0-9-]*)(=.*)?", re.DOTALL)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Not every name with TOKEN in it: TOKENIZERS_PARALLELISM is a switch.
_SECRET = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?:^|[\s;&|(])([A-Za-z_][A-Za-z0-9_]*)=(?![\"']?[$`])[\"']?[^\s\"';]")
_SECRETS_TRAVEL = "a profile is copied into sbatch text; export it in the shell that submits, and jobs inherit it"

# Flags that this program sets, and where a profile or a command says what they should be.
_FIELD_OF = {
    "partition": "partition", "account": "account", "qos": "qos", "reservation": "reservation",
    "constraint": "constraint", "nodes": "nodes", "gres": "gpus_per_node and gpu_type", "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node", "gpus-per-task": "gpus_per_node", "cpus-per-task": "cpus_per_node",
    "mem": "memory", "mem-per-cpu": "memory", "mem-per-gpu": "memory", "time": "time", "signal": "signal_lead_s",
    "export": "environment", "export-file": "environment",
}  # fmt: skip
_OURS = (
    "requeue", "no-requeue",
    "job-name", "comment", "hold", "exclude", "dependency", "kill-on-invalid-dep", "ntasks", "ntasks-per-node",
    "output", "error", "open-mode", "array", "wrap", "wait", "parsable", "quiet", "test-only",
)  # fmt: skip
_OURS_SRUN = (
    "cpus-per-task", "kill-on-bad-exit", "wait", "export", "output", "error", "unbuffered", "nodes", "ntasks",
    "ntasks-per-node",
)  # fmt: skip


_CLUSTER: TypeAdapter[Cluster] = TypeAdapter(Cluster)


def load_cluster(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Cluster:
    """Read a profile file, or a shipped profile by name, and apply `key.sub=value` overrides.

    Relative paths become absolute, from the working directory.

    Raises:
        RecipeError: lists every problem: dotted key, value, what was expected, and the nearest known key.
    """
    try:
        path = resources.find(FOLDER, str(name_or_path))
    except FileNotFoundError as error:
        raise RecipeError(str(error)) from None
    values = read_values(path)
    problems = [problem for text in overrides if (problem := override(values, text))]
    problems += [*_environment_problems(values), *_flag_problems(values), *_setup_problems(values)]
    return _absolute(decode(_CLUSTER, Cluster, values, str(path), problems, _contradictions))


def split_changes(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What `key=value` words change of the recipe, and of the profile: `cluster.key=value`."""
    recipe = [text for text in overrides if not text.startswith("cluster.")]
    return recipe, [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")]


def site_folder(cluster: Cluster, name: str) -> Path:
    """Where what is learned of a cluster is kept for all its runs: excluded nodes, what `doctor` found."""
    return Path(cluster.shared or "~/.wavefleet").expanduser() / Path(name).stem


def to_json(cluster: Cluster) -> dict[str, Any]:
    """Plain values of a checked profile; `from_json` reads them back."""
    values: dict[str, Any] = _CLUSTER.dump_python(cluster, mode="json")
    return values


def from_json(values: Mapping[str, Any]) -> Cluster:
    """The profile that `to_json` wrote."""
    return _CLUSTER.validate_python(values)


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables that every process of a job has, those of the offline cache included."""
    return {**_cache_environment(cluster.cache), **cluster.environment}


def _cache_environment(cache: str | None) -> dict[str, str]:
    """All of them: a HF_HUB_CACHE that the submitter's shell brings along would win over HF_HOME."""
    if cache is None:
        return {}
    folders = {"HF_HOME": cache, "HF_HUB_CACHE": f"{cache}/hub", "HF_DATASETS_CACHE": f"{cache}/datasets"}
    return {**folders, "HF_HUB_OFFLINE": "1"}


def accelerate_config(cluster: Cluster) -> str:
    """An accelerate config: a shipped one's name, or an absolute path."""
    if cluster.accelerate is not None:
        return cluster.accelerate
    if cluster.gpus_per_node == 0:
        return "cpu"
    return "one_gpu" if cluster.nodes * cluster.num_processes == 1 else "ddp"


def _environment_problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with names of variables; takes secrets out of the values, so that no message repeats them."""
    given = values.get("environment")
    if not isinstance(given, dict):
        return []
    found = []
    taken = _cache_environment("" if values.get("cache") is not None else None)
    for name in [str(key) for key in given]:
        where = f"environment.{name}"
        if not _VARIABLE.fullmatch(name):
            found.append(f"{where}: should be a variable's name: letters, digits and _")
        elif _SECRET.search(name):
            found.append(f"{where}: looks like a secret; {_SECRETS_TRAVEL}")
        elif name.startswith(("SLURM_", "SUBMITIT_")):
            found.append(f"{where}: Slurm or submitit sets this itself")
        elif name in taken:
            found.append(f"{where}: `cache` sets this")
        elif "\n" in str(given[name]) or "\0" in str(given[name]):
            found.append(f"{where}: {given[name]!r}: should be one line")
    values["environment"] = {key: value for key, value in given.items() if not _SECRET.search(str(key))}
    return found


def _flag_problems(values: Mapping[str, Any]) -> list[str]:
    """Options of srun and sbatch that are no options, or that this program sets."""
    found = []
    given = values.get("sbatch")
    for name in map(str, given if isinstance(given, dict) else ()):
        if name in _FIELD_OF:
            found.append(f"sbatch.{name}: set the field {_FIELD_OF[name]}")
        elif name in _OURS:
            found.append(f"sbatch.{name}: this program sets it itself")
        elif not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            found.append(f"sbatch.{name}: should be a long option's name without --, `mail-user` say")
    arguments = as_list(values.get("srun"))
    for index, argument in enumerate(arguments if isinstance(arguments, list) else ()):
        match = _FLAG.fullmatch(str(argument))
        if match is None:
            found.append(f"srun.{index}: {argument!r}: should be --name or --name=value")
        elif match.group(1) in _OURS_SRUN:
            found.append(f"srun.{index}: --{match.group(1)}: this program sets it itself")
    return found


def _setup_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with lines of shell: those of the job, and those that every node runs."""
    found = []
    lines = [(field, as_list(values.get(field))) for field in ("setup", "preflight")]
    given = [(field, index, str(line)) for field, many in lines if isinstance(many, list)
             for index, line in enumerate(many)]  # fmt: skip
    for field, index, text in given:
        if re.search(r"^\s*#SBATCH", text, re.MULTILINE):
            found.append(f"{field}.{index}: {text!r}: sbatch does not read options here; use the field sbatch")
        for name in _ASSIGNED.findall(text):
            if _SECRET.search(name):
                found.append(f"{field}.{index}: {name} looks like a secret; {_SECRETS_TRAVEL}")
    return found


def _contradictions(cluster: Cluster) -> list[str]:
    """Values that are each right and together wrong."""
    found = []
    if cluster.signal_lead_s >= cluster.time * 60:
        found.append(f"signal_lead_s: {cluster.signal_lead_s}: should be under the time, {cluster.time * 60} s")
    if cluster.gpu_type is not None and cluster.gpus_per_node == 0:
        found.append(f"gpu_type: {cluster.gpu_type!r}: gpus_per_node is 0")
    if cluster.gpu_memory is not None and cluster.gpus_per_node == 0:
        found.append(f"gpu_memory: {cluster.gpu_memory!r}: gpus_per_node is 0")
    if cluster.gpus_per_node and cluster.num_processes > cluster.gpus_per_node:
        found.append(f"processes_per_node: {cluster.num_processes}: gpus_per_node is {cluster.gpus_per_node}")
    if cluster.num_processes > cluster.cpus_per_node:
        found.append(f"cpus_per_node: {cluster.cpus_per_node}: should be at least one for each process a node, "
                     f"{cluster.num_processes}")  # fmt: skip
    container = cluster.container
    if container.kind == "none" and container != ContainerSettings():
        found.append("container.kind: none, and other container fields are set; choose apptainer or pyxis")
    if container.kind != "none" and container.image is None:
        found.append(f"container.image: missing; {container.kind} needs one")
    for index, argument in enumerate(container.extra if container.kind == "pyxis" else ()):
        if not argument.startswith("--container-"):
            found.append(f"container.extra.{index}: {argument!r}: should be a --container-... option of srun")
    return found + _accelerate_problems(cluster)


def _accelerate_problems(cluster: Cluster) -> list[str]:
    """A config that is not there, or is for other hardware; accelerate would often do something else, silently."""
    if cluster.accelerate is None:
        return []
    where = f"accelerate: {cluster.accelerate!r}"
    try:
        config = read_values(resources.find("accelerate_configs", cluster.accelerate))
    except (FileNotFoundError, RecipeError) as error:
        return [f"{where}: {error}"]
    num_processes = cluster.nodes * cluster.num_processes
    if not config.get("use_cpu") and cluster.gpus_per_node == 0:
        return [f"{where}: it is for GPUs, and gpus_per_node is 0"]
    if str(config.get("distributed_type")) in ("NO", "False", "MULTI_CPU") and num_processes > 1:
        return [f"{where}: it runs one process, and the nodes have {num_processes} together"]
    return []


def _absolute(cluster: Cluster) -> Cluster:
    """The profile with its relative paths made absolute; names of shipped files and addresses of images stay."""

    def full(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    def file_or_name(name: str | None) -> str | None:
        return full(name) if name is not None and Path(name).expanduser().exists() else name

    def mounted(mount: str) -> str:
        source, colon, rest = mount.partition(":")
        return source + colon + rest if source.startswith("$") else full(source) + colon + rest

    container = cluster.container
    return replace(
        cluster,
        cache=None if cluster.cache is None else full(cluster.cache),
        shared=None if cluster.shared is None else full(cluster.shared),
        accelerate=file_or_name(cluster.accelerate),
        container=replace(container, image=file_or_name(container.image), mounts=tuple(map(mounted, container.mounts))),
    )
