"""Waiting for other ranks, from the last gradient to the end of the exchange: by the clock, or by a GPU's events."""

import pytest
import torch

from asr_train import peer_wait
from asr_train.peer_wait import PeerWait


class Clock:
    now_s = 100.0


class Event:
    """As torch.cuda.Event, on a device that a test moves; whoever asks the device for anything else fails."""

    def __init__(self):
        self.recorded_s = None

    def record(self):
        self.recorded_s = Clock.now_s

    def elapsed_time(self, end):
        return 1000 * (end.recorded_s - self.recorded_s)


@pytest.fixture(params=["cpu", "cuda"])
def wait(request, monkeypatch):
    """On a GPU the host's clock says nothing: it enqueues everything at once."""
    is_gpu = request.param == "cuda"
    monkeypatch.setattr(peer_wait, "_event", Event)
    monkeypatch.setattr(peer_wait.time, "monotonic", lambda: 0.0 if is_gpu else Clock.now_s)
    return PeerWait(torch.device(request.param))


def test_the_last_gradient_counts_and_each_step_for_itself(wait):
    for _ in range(2):
        for _bucket in range(3):
            Clock.now_s += 2
            wait.gradients_are_there()
        Clock.now_s += 5
        wait.sums_are_there()
        Clock.now_s += 7
        assert wait.read_s() == pytest.approx(5)


def test_a_step_without_one_of_the_moments_has_waited_for_nobody(wait):
    wait.gradients_are_there()
    Clock.now_s += 5
    assert wait.read_s() == 0
    wait.sums_are_there()
    assert wait.read_s() == 0, "the gradient was of the step before"
