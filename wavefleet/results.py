"""What the functions return."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from asr_train.data.corpus import Corpus
    from asr_train.data.plan import PlanStatistics
    from asr_train.forecast import Forecast
    from asr_train.transcribe import BadFile, Transcript


@dataclass(frozen=True, kw_only=True)
class PreparedSet:
    """One set of a corpus.

    Attributes:
        rows: utterances that were kept.
        hours: of audio in them.
        refused: reason -> rows that were refused for it; `rejected.jsonl` of the corpus names each.
    """

    rows: int
    hours: float
    refused: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A corpus on disk.

    Attributes:
        path: its folder.
        sets: `train`, and the evaluation sets by name.
        vocabulary: its tokens; the index of a token is its label.
        corpus: the utterances themselves: `corpus.train.text(0)`, `corpus.train.waveform(0)`.
    """

    path: Path
    sets: Mapping[str, PreparedSet]
    vocabulary: tuple[str, ...]
    corpus: "Corpus"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a training would be.

    Attributes:
        steps_per_epoch: optimizer updates that pass over the corpus once.
        max_steps: updates of the whole training.
        num_epochs: passes that these make.
        epoch: what an epoch consists of: units, audio, padding, shapes.
        forecast: all of it: for 1 to 512 processes, memory in parts, time at a pace, checkpoints.
        warnings: what speaks against it, in sentences.
    """

    steps_per_epoch: int
    max_steps: int
    num_epochs: float
    epoch: "PlanStatistics"
    forecast: "Forecast"
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training that has ended. Stands for its run directory wherever a path is taken.

    Attributes:
        run: the run directory.
        ended: `done`, or `stopped` on request with a checkpoint: the same call goes on.
        step: updates of the run.
        loss: of its last training line.
        best_metric: what picks the best model, `dev/wer` say; None where nothing was evaluated.
        best_value: its best value, 0.1 for a WER of 10 %.
        best_step: the update after which it was reached.
        scores: set -> metric -> value, of each set's last evaluation.
    """

    run: Path
    ended: Literal["done", "stopped"]
    step: int
    loss: float | None
    best_metric: str | None
    best_value: float | None
    best_step: int | None
    scores: Mapping[str, Mapping[str, float]]

    def __fspath__(self) -> str:
        return str(self.run)


@dataclass(frozen=True, kw_only=True)
class Transcribed:
    """What was said in some files.

    Attributes:
        transcripts: file, duration, text and words with times of each file, in order.
        bad: files that could not be read, and why.
    """

    transcripts: tuple["Transcript", ...]
    bad: tuple["BadFile", ...]

    @property
    def text(self) -> str:
        """All texts, a line a file."""
        return "\n".join(transcript.text for transcript in self.transcripts)
