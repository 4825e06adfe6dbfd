"""Wavefleet for notebooks and programs: a function for each verb of the command, and what it returns.

    import wavefleet

    run = wavefleet.train("minds14", {"optim.lr": 3e-5})
    print(run.best_metric, run.best_value)
    model = wavefleet.export(run)
    for transcript in wavefleet.transcribe(model, "interview.mp3").transcripts:
        print(transcript.text)

The functions do what the verbs do, by the same code; they print nothing unless told to (`verbose=True`), and raise
`WavefleetError`s where the verbs end with a message. Importing this loads neither torch nor anything else that is slow.

The package is called as the command is. `asr_train`, the training program beneath, has modules `prepare`, `train` and
so on, and `python -m asr_train.prepare` runs one: functions of the same names could not live beside them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from asr_train import __version__ as __version__

if TYPE_CHECKING:
    from asr_train.captions import Word
    from asr_train.config import Recipe
    from asr_train.data.corpus import Corpus
    from asr_train.data.plan import PlanStatistics
    from asr_train.errors import (
        CheckpointError,
        CorpusError,
        ModelError,
        RecipeError,
        RunError,
        TrainingError,
        WavefleetError,
    )
    from asr_train.export import Exported
    from asr_train.forecast import Forecast
    from asr_train.recipe import load_recipe
    from asr_train.score import SetScore
    from asr_train.transcribe import BadFile, Transcript
    from wavefleet.api import evaluate, export, plan, prepare, train, transcribe
    from wavefleet.results import Planned, Prepared, PreparedSet, Trained, Transcribed

_HOMES = {
    "asr_train.recipe": ("load_recipe",),
    "wavefleet.api": ("evaluate", "export", "plan", "prepare", "train", "transcribe"),
    "wavefleet.results": ("Planned", "Prepared", "PreparedSet", "Trained", "Transcribed"),
    "asr_train.captions": ("Word",),
    "asr_train.config": ("Recipe",),
    "asr_train.data.corpus": ("Corpus",),
    "asr_train.data.plan": ("PlanStatistics",),
    "asr_train.errors": (
        "CheckpointError", "CorpusError", "ModelError", "RecipeError", "RunError", "TrainingError", "WavefleetError",
    ),
    "asr_train.export": ("Exported",),
    "asr_train.forecast": ("Forecast",),
    "asr_train.score": ("SetScore",),
    "asr_train.transcribe": ("BadFile", "Transcript"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BadFile",
    "CheckpointError",
    "Corpus",
    "CorpusError",
    "Exported",
    "Forecast",
    "ModelError",
    "PlanStatistics",
    "Planned",
    "Prepared",
    "PreparedSet",
    "Recipe",
    "RecipeError",
    "RunError",
    "SetScore",
    "Trained",
    "TrainingError",
    "Transcribed",
    "Transcript",
    "WavefleetError",
    "Word",
    "evaluate",
    "export",
    "load_recipe",
    "plan",
    "prepare",
    "train",
    "transcribe",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
