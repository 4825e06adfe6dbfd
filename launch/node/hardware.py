"""What NVIDIA's driver says of a node's GPUs: how many, what is broken, and which errors came while a training ran.

Without a driver there is nothing to say, and nothing is; a question that a GPU does not answer, ECC of a gaming card
say, is passed over.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import pynvml


class GpuWatch:
    """The errors of some GPUs from here on; a context manager.

    Attributes:
        broken: what is wrong with them already, in sentences.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self.broken: list[str] = []
        self._uuids = uuids
        self._gpus: dict[str, Any] = {}  # name for a person -> handle
        self._events: Any = None
        self._uncorrected: Mapping[str, int] = {}

    def __enter__(self) -> Self:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._gpus = {f"GPU {number} ({uuid})": _handle(uuid) for number, uuid in enumerate(self._uuids)}
            self._events = pynvml.nvmlEventSetCreate()
        for name, gpu in self._gpus.items():
            self.broken += [f"{name} {text}" for text in _broken(gpu)]
            with suppress(pynvml.NVMLError):
                pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, self._events)
        self._uncorrected = self._count()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(pynvml.NVMLError):
            if self._events is not None:
                pynvml.nvmlEventSetFree(self._events)
            pynvml.nvmlShutdown()

    def memory_bytes(self) -> dict[str, int]:
        """All of each GPU's memory."""
        found = {}
        for name, gpu in self._gpus.items():
            with suppress(pynvml.NVMLError):
                found[name] = int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total)
        return found

    def errors(self) -> list[str]:
        """Xids and uncorrectable memory errors since it began or was last asked, in sentences."""
        found = []
        while self._events is not None:
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError:  # none is waiting
                break
            found.append(f"Xid {event.eventData} on {self._name(event.device)}")
        before, self._uncorrected = self._uncorrected, self._count()
        for name, count in self._uncorrected.items():
            if count > before.get(name, 0):
                found.append(f"uncorrectable ECC errors on {name}: {count - before.get(name, 0)} more")
        return found

    def _count(self) -> dict[str, int]:
        """Uncorrectable memory errors of each GPU since the driver was loaded."""
        kind, since = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        found = {}
        for name, gpu in self._gpus.items():
            with suppress(pynvml.NVMLError):
                found[name] = int(pynvml.nvmlDeviceGetTotalEccErrors(gpu, kind, since))
        return found

    def _name(self, device: Any) -> str:
        with suppress(pynvml.NVMLError):
            uuid = str(pynvml.nvmlDeviceGetUUID(device))
            return next((name for name in self._gpus if uuid in name), uuid)
        return "a GPU"


def _handle(uuid: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByUUID(uuid)


def _broken(gpu: Any) -> list[str]:
    """What a GPU says of its memory. Remapped rows are Ampere's and later, retired pages those before."""
    found = []
    rows: Callable[[Any], tuple[int, int, int, int]] = pynvml.nvmlDeviceGetRemappedRows
    with suppress(pynvml.NVMLError):
        _, _, is_pending, has_failed = rows(gpu)
        if has_failed:
            found.append("has bad memory that it can no longer replace: have it exchanged")
        elif is_pending:
            found.append("has bad memory that it replaces at its next reset: have it reset")
    with suppress(pynvml.NVMLError):
        if pynvml.nvmlDeviceGetRetiredPagesPendingStatus(gpu) == pynvml.NVML_FEATURE_ENABLED:
            found.append("retires bad memory at the next reboot: have the node rebooted")
    return found
