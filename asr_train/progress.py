"""What a person sees of a training: a progress bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asr_train.errors import say
from asr_train.ledger import name_of
from asr_train.verbosity import is_quiet

_NUM_SHARES = 3  # of the ledger, that a line has room for


class TrainingProgress:
    """Shows steps, loss, WER and speed; says notable things above the bar. Silent on every rank but the first."""

    def __init__(self, *, start_step: int, max_steps: int, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._max_steps = max_steps
        self._start = (start_step, time.monotonic())
        self._scores = ""
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if is_shown and self._console.is_terminal and not is_quiet():
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=max_steps, completed=start_step, shown="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()

    def advance(self, step: int) -> None:
        """Note that `step` updates are done."""
        self._update(completed=step)

    def log(self, line: dict[str, Any], shares: Mapping[str, float]) -> None:
        """Show a training line of metrics.jsonl, and the ledger's largest shares of the attempt's time."""
        shown = (
            f"loss {line['loss']:.3f}  {line['audio_s_per_s']:.0f} audio-s/s{self._scores}"
            f"  {line['memory_bytes'] / 1e9:.1f} GB  {_largest(shares)}"
        )
        if self._bar is not None:
            self._update(shown=shown)
        else:
            first_step, started = self._start
            per_step = (time.monotonic() - started) / max(1, line["step"] - first_step)
            left_s = per_step * (self._max_steps - line["step"])
            self.say(f"step {line['step']}/{self._max_steps}  {shown}  {_duration(left_s)} left")

    def score(self, set_name: str, line: dict[str, Any]) -> None:
        """Show an evaluation line of metrics.jsonl."""
        self._scores = f"  wer {line['wer']:.1%}"
        self.say(
            f"step {line['step']}  {set_name}: WER {line['wer']:.2%}, CER {line['cer']:.2%}, {line['num_rows']} rows"
        )

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self._is_shown:
            return
        if self._bar is not None:
            try:
                self._bar.console.print(text, highlight=False, markup=False)
            except OSError:
                self._bar = None
        else:
            say(text)

    def _update(self, **values: Any) -> None:
        """Change the bar, if there is one; without its terminal it is no more."""
        if self._bar is not None:
            try:
                self._bar.update(self._task, **values)
            except OSError:
                self._bar = None


def _largest(shares: Mapping[str, float]) -> str:
    """The parts of the ledger that take most."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:_NUM_SHARES]
    return ", ".join(f"{name_of(part)} {share:.0%}" for part, share in largest if share >= 0.005)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
