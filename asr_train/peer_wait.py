"""How long a rank waits for others at the end of a step: from its last gradient to the end of the exchange."""

import time

import torch


class PeerWait:
    """Two moments of a step: when the last of this rank's gradients was there, and when the sums over ranks were.

    On a GPU both are events, read after the step's one host sync, so that they cost none. Only DDP shows when a
    gradient is there; under FSDP2 and DeepSpeed ranks also wait for each other inside forward and backward, which
    nothing here sees, and what is measured is the last exchange alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events = [_event() for _ in range(2)] if self._is_cuda else []
        self._moments: list[float | None] = [None, None]

    def gradients_are_there(self) -> None:
        """Called for each bucket of gradients, and at the end of the backward: the last call counts."""
        self._mark(0)

    def sums_are_there(self) -> None:
        """Called once the exchange is over, or, on a GPU, enqueued."""
        self._mark(1)

    def read_s(self) -> float:
        """Seconds between the two moments of the step that the host has just waited for; 0 where there were none."""
        first, last = self._moments
        self._moments = [None, None]
        if first is None or last is None:
            return 0.0
        if self._is_cuda:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return last - first

    def _mark(self, which: int) -> None:
        self._moments[which] = time.monotonic()
        if self._is_cuda:
            self._events[which].record()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
