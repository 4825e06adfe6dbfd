"""Random generators of a process, as JSON: for what no unit seeds."""

import base64
import random
from typing import Any

import numpy as np
import torch


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
