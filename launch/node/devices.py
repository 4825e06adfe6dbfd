"""What this machine has to train on, found without torch."""

import os
from collections.abc import Mapping
from importlib import metadata

import pynvml


def num_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that torch would see: those of the driver, less what CUDA_VISIBLE_DEVICES hides."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return 0
    return len(visible_gpus(environ))


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """UUIDs of the driver's GPUs that CUDA_VISIBLE_DEVICES does not hide; slices of a GPU under their own."""
    installed = _installed_gpus()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return installed if visible is None else _visible(visible, installed)


def gpu_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """The driver's name of the first GPU that torch would see; None for a slice of one, whose memory differs."""
    uuids = visible_gpus(environ) if num_gpus(environ) else []
    if not uuids or uuids[0].startswith("MIG-"):
        return None
    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(uuids[0])))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def torch_is_cpu_build() -> bool:
    """Whether the installed torch is one that uses no GPU."""
    return metadata.version("torch").endswith("+cpu")


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _installed_gpus() -> list[str]:
    """UUIDs of the driver's GPUs, in its order; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _visible(visible: str, installed: list[str]) -> list[str]:
    """Those of the list that are real; as in CUDA, the first that is not ends it, and so does one named twice."""
    seen: list[str] = []
    for name in (part.strip() for part in visible.split(",")):
        if name.isdigit() and int(name) < len(installed):
            uuid = installed[int(name)]
        elif name.startswith("MIG-"):  # a slice of a GPU; the driver lists only whole ones
            uuid = name
        else:
            uuid = next((known for known in installed if name and known.startswith(name)), "")
        if not uuid or uuid in seen:
            break
        seen.append(uuid)
    return seen
