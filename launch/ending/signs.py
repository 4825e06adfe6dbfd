"""What the text of an error says of its cause. Texts of torch, NCCL, gloo, Slurm and the kernel, and our own errors."""

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

from asr_train.errors import EXIT_NO_CHECKPOINT, EXIT_USAGE
from launch.verdict import RETRY

SignKind = Literal["out_of_memory", "hardware", "network", "recipe", "data", "code", "no_checkpoint", "failed"]

_MAX_CHARACTERS = 600
_GPU_MEMORY: Final = (
    f"Shard the model (fsdp2) or take a larger GPU, then {RETRY}. Or start a new run, for it has another plan"
    " of the data, with a lower unit_audio_s and as many more units_per_step"
)
_HOST_MEMORY: Final = "Ask for more memory in the cluster profile, or lower num_workers"
_SHARED_MEMORY: Final = "Give the job more shared memory (/dev/shm), or lower num_workers"
_MEND: Final = f"Mend what the message names, then {RETRY}"
_PORT: Final = "Another program listens on the port; the next attempt takes another one"


@dataclass(frozen=True)
class Sign:
    """What a text says.

    Attributes:
        text: the line that says it.
        is_certain: it names a cause of its own; otherwise it may as well follow from something else's end.
        advice: what a person can do.
    """

    kind: SignKind
    text: str
    is_certain: bool = False
    advice: str = ""


# First match wins. A model or a corpus that could not be loaded for want of memory lacks memory.
_PATTERNS: Final[tuple[tuple[SignKind, bool, str, str], ...]] = (
    (
        "out_of_memory", True, _GPU_MEMORY,
        r"(?:CUDA|HIP) out of memory|CUDA error: out of memory|C[uU][dD][aA] failure.{0,12}out of memory"
        r"|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|\b(?:OutOf|Unit)MemoryError\b",
    ),
    (
        "out_of_memory", True, _SHARED_MEMORY,
        r"unable to allocate shared memory|out of shared memory|killed by signal: Bus error",
    ),
    (
        "out_of_memory", True, _HOST_MEMORY,
        r"\bMemoryError\b|can't allocate memory|not enough memory|Cannot allocate memory|\bbad_alloc\b"
        r"|\boom[-_]kill|Out of memory: Killed|OOM Killed|Exceeded job memory limit"
        r"|Unable to allocate [\d.]+ [KMGT]?i?B",
    ),
    ("failed", True, _MEND, r"No space left on device|[Qq]uota exceeded|Read-only file system"),
    ("recipe", True, _MEND, r"^(?:error: )?(?:\w+\.)*(?:RecipeError|RunError)\b"),
    ("data", True, _MEND, r"^(?:error: )?(?:\w+\.)*(?:CorpusError|AudioError)\b"),
    ("no_checkpoint", True, _MEND, r"^(?:error: )?(?:\w+\.)*CheckpointError\b"),
    (
        "hardware", True, "",
        r"[Uu]ncorrectable (?:ECC|NVLink)|ECCUncorrectable|fallen off the bus|hardware stack error"
        r"|device\(s\) is/are busy or unavailable|no CUDA-capable device is detected"
        r"|Unable to determine the device handle|Failed to initialize NVML",
    ),
    ("network", True, _PORT, r"EADDRINUSE|[Aa]ddress already in use"),
    (
        "code", True, _MEND,
        r"^(?:\w+\.)*(?:ImportError|ModuleNotFoundError|SyntaxError|IndentationError|TabError)\b"
        r"|: No module named |undefined symbol: |cannot open shared object file",
    ),
    (
        "network", False, "",
        r"gloo/transport|Gloo connect|Connection (?:closed|reset) by peer|NCCL error|nccl(?:System|Remote)Error"
        r"|Connection (?:refused|timed out)|No route to host|Network is (?:unreachable|down)"
        r"|Name or service not known|[Nn]ame resolution|Dist(?:Network|Store|Backend)Error|IBV_WC_|Broken pipe"
        r"|client socket has (?:failed|timed out)|MaxRetryError|couldn't connect to|ReadTimeout",
    ),
    ("recipe", True, _MEND, r"^(?:error: )?(?:\w+\.)*ModelError\b"),
)  # fmt: skip
_COMPILED: Final = tuple(re.compile(pattern, re.MULTILINE) for *_, pattern in _PATTERNS)
# our own errors are written for the user: all their lines count
_OURS: Final = re.compile(r"(?:Recipe|Run|Model|Corpus|Audio|Checkpoint|Training|UnitMemory)Error\b")

_TIMEOUT: Final = re.compile(r"collective operation timeout|[Tt]imed out waiting \d+ ?ms for (?:recv|send)")
_ERROR_LINE: Final = re.compile(r"^(?:error: .+|(?:\w+\.)*\w*(?:Error|Exception)\b.*)$", re.MULTILINE)
# torchrun's closing report of a worker; a negative exit code is the signal that ended it
_WORKER: Final = re.compile(r"\brank\s*: (\d+) \(local_rank: \d+\)\s*\n.*?exitcode\s*: (-?\d+)")
# https://docs.nvidia.com/deploy/xid-errors/: what a program can cause by itself (13, 31, 43), and its clean-up (45)
_SOFTWARE_XIDS: Final = {13, 31, 43, 45}


def read_error(message: str, exit_code: object = None) -> Sign:
    """What a rank's own last words say, `RuntimeError: CUDA out of memory. ...` say."""
    is_ours = _OURS.match(message) is not None
    if sign := read_log(message):
        return replace(sign, text=_shortened(message.strip())) if is_ours else sign
    first = _shortened(message.strip() if is_ours else message.strip().partition("\n")[0]) or "no message"
    if exit_code == EXIT_USAGE:
        return Sign("recipe", first, True, _MEND)
    if exit_code == EXIT_NO_CHECKPOINT:
        return Sign("no_checkpoint", first, True, _MEND)
    return Sign("failed", first)


def read_log(text: str) -> Sign | None:
    """What the last lines of a log say of the cause; None when they name no known one."""
    for (kind, is_certain, advice, _), pattern in zip(_PATTERNS, _COMPILED, strict=True):
        for found in pattern.finditer(text):
            line = _line_at(text, found.start())
            if "Warning" not in line:
                return Sign(kind, line, is_certain, advice)
    return None


def last_error(text: str) -> str:
    """The last line of a log that looks like an error's; empty when none does."""
    found = _ERROR_LINE.findall(text)
    return _shortened(found[-1].strip()) if found else ""


def says_timeout(text: str) -> bool:
    """Whether ranks waited for one that did not answer, rather than lost it."""
    return _TIMEOUT.search(text) is not None


def worker_exit_codes(text: str) -> dict[int, int]:
    """Rank -> exit code of the workers that torchrun reports as failed; -9 for SIGKILL."""
    return {int(rank): int(code) for rank, code in _WORKER.findall(text)}


def is_fault_of_node(hardware: str) -> bool:
    """Whether a node's hardware error speaks against the node; some Xids only tell what the program did."""
    numbers = {int(number) for number in re.findall(r"Xid\s*(?:\([^)]*\))?:?\s*(\d+)", hardware)}
    return not numbers or not numbers <= _SOFTWARE_XIDS


def _line_at(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return _shortened(text[start : end if end >= 0 else len(text)].strip())


def _shortened(line: str) -> str:
    return line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1] + "…"
