"""Random generators of a process: seeded for each unit, and as JSON for what no unit seeds."""

import base64
import random
from typing import Any

import numpy as np
import torch


def seed(number: int, device: torch.device) -> None:
    """Seed torch's generators of the host and of this process's device, with what `torch.manual_seed` gives them.

    That one notes where it was called from, with all source lines, once for each kind of device that is not in use;
    it is called for every unit.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type != "cpu":
        torch.manual_seed(number)


def current() -> dict[str, Any]:
    """State of this process's random generators, as JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": _encoded(torch.get_rng_state()),
        "cuda": _encoded(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, gauss],
    }


def set_current(saved: Any) -> None:
    """Put this process's generators back to where `current` found them.

    Raises:
        ValueError: that is no such state.
    """
    try:
        torch.set_rng_state(_decoded(saved["torch"]))
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_decoded(saved["cuda"]))
        version, internal, gauss = saved["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = saved["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise ValueError(f"no state of random generators: {error}") from None


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
