"""The fields of a cluster profile and their defaults, as frozen dataclasses. `cluster.py` reads and checks them."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import AfterValidator, BeforeValidator, PlainValidator, StringConstraints
from pydantic_core import PydanticCustomError

from asr_train.config import Count, CountOrZero, _Strict, part, setting

_TIME = re.compile(r"(?:(?P<days>[0-9]+)-)?([0-9]+)(?::([0-5][0-9]))?(?::(?P<seconds>[0-5][0-9]))?")


def line_problem(value: str) -> str | None:
    r"""Why a value cannot stand in an #SBATCH line, or None.

    sbatch reads those lines by rules of its own: a backslash escapes even between single quotes, so that what a shell
    takes as one word, sbatch may take apart (Slurm 22.05: `'a\b'` is read as ab, `'a\'"'"''` as an open quote).
    """
    if not value.strip():
        return "should not be empty"
    if not value.isprintable():
        return "should be one line of printable characters"
    return "should have no backslash; sbatch would read it as an escape" if "\\" in value else None


def _one_line(value: str) -> str:
    if problem := line_problem(value):
        raise PydanticCustomError("one_line", problem)
    return value


def _as_text(value: Any) -> Any:
    """Numbers are taken as they read; a bare `on` or `yes` is a truth value in YAML, and what was written is lost."""
    if isinstance(value, bool):
        raise PydanticCustomError("quote_it", "should be text; put on, off, yes, no, true and false in quotes")
    return str(value) if isinstance(value, (int, float)) else value


def _with_unit(value: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*[KMGT]|0", value):  # without a unit Slurm takes megabytes
        raise PydanticCustomError("memory", "should be a number with its unit, 64G say, or 0")
    return value


def as_bytes(memory: str | None) -> int:
    """Bytes of `80G`, in powers of 1024 as Slurm counts; 0 for None."""
    units = {unit: 1024**power for power, unit in enumerate("KMGT", start=1)}
    return 0 if memory is None else int(memory.rstrip("KMGT")) * units.get(memory[-1], 1)


def _flag_value(value: Any) -> str | bool:
    text = value if value is True or value is False else _as_text(value)
    if text is not True and not isinstance(text, str):
        raise PydanticCustomError("flag", "should be text, a number, or true for an option without a value")
    return text if text is True else _one_line(text)


def as_list(value: Any) -> Any:
    """One text where a list of them may stand."""
    return [value] if isinstance(value, str) else value


def _as_minutes(value: Any) -> Any:
    """Minutes, rounded up, of a number of minutes, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    text = "" if isinstance(value, bool) else str(value)
    if re.fullmatch("[0-9]+", text):
        return int(text)
    match = _TIME.fullmatch(text)
    # MM:SS is Slurm's too, and not what people who write 12:00 mean.
    if match is None or (match["days"] is None and match["seconds"] is None):
        raise PydanticCustomError("time", "should be minutes, HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    total_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-total_s // 60)


Text = Annotated[str, AfterValidator(_one_line)]
Minutes = Annotated[Count, BeforeValidator(_as_minutes)]
Memory = Annotated[str, BeforeValidator(_as_text), AfterValidator(_with_unit)]
GpuType = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Interface = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
Mount = Annotated[str, AfterValidator(_one_line), StringConstraints(pattern=r"^[^,:]+(:[^,:]+){0,2}$")]
Lines = Annotated[tuple[str, ...], BeforeValidator(as_list)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_list)]
Value = Annotated[str, BeforeValidator(_as_text)]
FlagValue = Annotated[str | bool, PlainValidator(_flag_value)]


@dataclass(frozen=True, kw_only=True)
class ContainerSettings(_Strict):
    """The container that the job's Python runs in, if any; given to apptainer or pyxis as it stands."""

    kind: Literal["none", "apptainer", "pyxis"] = setting("what starts the container", "none")
    image: Text | None = setting("a .sif or .sqsh file, or an address that apptainer or pyxis takes", None)
    mounts: Annotated[tuple[Mount, ...], BeforeValidator(as_list)] = setting(
        "folders seen inside: PATH, SRC:DST or SRC:DST:ro", ()
    )
    extra: Texts = setting("further arguments of `apptainer exec`, or --container-... options of srun", ())
    python: Text | None = setting("Python inside the container; null is python3", None)


@dataclass(frozen=True, kw_only=True)
class Cluster(_Strict):
    """What a site's Slurm is asked for, and how jobs run there."""

    partition: Text | None = setting("partition, or several with commas; null is the cluster's default", None)
    account: Text | None = setting("account that is charged", None)
    qos: Text | None = setting("quality of service", None)
    reservation: Text | None = setting("reservation to use", None)
    constraint: Text | None = setting("node features wanted, `a100&ib` say", None)
    nodes: Count = setting("nodes a job", 1)
    gpus_per_node: CountOrZero = setting("GPUs a node; 0 is CPU nodes")
    gpu_type: GpuType | None = setting("type of GPU, as the cluster's gres names it, `a100` say", None)
    gpu_memory: Memory | None = setting("least memory of a GPU, `80G` say; a node with less trains nothing", None)
    cpus_per_node: Count = setting("CPUs a node")
    memory: Memory | None = setting(
        "memory a node with its unit, `64G` say; 0 is all; null the cluster's default", None
    )
    time: Minutes = setting("time limit: minutes, HH:MM:SS or D-HH:MM:SS; kept as minutes")
    signal_lead_s: Annotated[int, Interval(ge=1, le=65535)] = setting(
        "seconds before the time limit at which Slurm warns the job, which then saves and stops", 300
    )
    setup: Lines = setting("shell lines before everything else on the first node; one that fails ends the job", ())
    modules: Texts = setting("environment modules to load, after the set-up lines", ())
    environment: dict[str, Value] = setting("variables for every process, taken literally; never secrets", {})
    cache: Text | None = setting(
        "Hugging Face folder with the models and data that jobs read, offline; null leaves jobs online", None
    )
    preflight: Lines = setting("shell lines on each node before training; where one fails, the node trains nothing", ())
    stage_corpus_to: Text | None = setting(
        "folder of each node that the corpus is copied to, `$TMPDIR` say, which the node fills in", None
    )
    srun: Texts = setting("further srun arguments, each as --name or --name=value", ())
    sbatch: dict[str, FlagValue] = setting("further sbatch options, name: value; true for one without a value", {})
    container: ContainerSettings = part(ContainerSettings, "the container that jobs run in")
    accelerate: str | None = setting(
        "accelerate config, a file or a shipped one; null is cpu, one_gpu or ddp, as fits", None
    )
    processes_per_node: Count | None = setting("training processes a node; null is one a GPU, or one", None)
    process_group_timeout_s: Count = setting("seconds a collective waits for a missing rank before it fails", 1800)
    continuation: Literal["auto", "requeue", "successor"] = setting(
        "how a run goes on: its job put back into the queue, or another job; auto is what `doctor` found to work",
        "auto",
    )
    private: bool = setting("run directories are their owner's alone; false lets others read them", True)
    shared: Text | None = setting(
        "folder that all nodes share, for what is learned of the cluster; null is ~/.wavefleet", None
    )
    rendezvous_interface: Interface | None = setting("network interface that ranks meet on, `ib0` say", None)

    @property
    def num_processes(self) -> int:
        """Training processes a node."""
        return self.processes_per_node or max(1, self.gpus_per_node)
