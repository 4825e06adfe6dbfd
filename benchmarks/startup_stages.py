"""`python benchmarks/startup_stages.py RECIPE`: train a recipe's first step, and print where the time until then went.

For `startup.py`. Times what `asr_train.train` calls, by their names there; the rest is what is between them.
"""

import json
import os
import sys
import time

_BEGUN_S = time.monotonic()

import importlib  # noqa: E402 - what follows is timed
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

_STAGES = {  # stage -> what of asr_train.train it calls
    "corpus: opened": ("_corpus",),
    "model: built": ("build_model",),
    "model: what padding does to it": ("padding_difference",),
    "accelerator": ("strategy.make_accelerator",),
    "plan": ("_make_plan",),
    "model: to the device, wrapped; optimizer": ("strategy.prepare", "create_state"),
    "checkpoints: looked for": ("choose",),
}
_FIRST_STEP = "first step"


def main(recipe: str) -> None:
    """Train with a clock around each stage."""
    seconds: dict[str, float] = {}
    for library in ("torch", "transformers", "accelerate"):
        start = time.monotonic()
        importlib.import_module(library)
        seconds[f"import {library}"] = time.monotonic() - start
    start = time.monotonic()
    train: Any = importlib.import_module("asr_train.train")
    log: Any = importlib.import_module("asr_train.training_log")
    seconds["import asr_train, and what else it needs"] = time.monotonic() - start

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.monotonic()
            found = function(*arguments, **options)
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start
            return found

        return call

    for stage, names in _STAGES.items():
        for name in names:
            *modules, last = name.split(".")
            owner = getattr(train, modules[0]) if modules else train
            setattr(owner, last, timed(stage, getattr(owner, last)))

    fit, begun = train.fit, 0.0

    def fit_once(*arguments: Any, **options: Any) -> Any:
        nonlocal begun
        begun = time.monotonic()
        return fit(*arguments, **options)

    def end_step(*arguments: Any, **options: Any) -> None:
        now = time.monotonic()
        seconds[_FIRST_STEP] = now - begun
        seconds["all else"] = now - _BEGUN_S - sum(seconds.values())
        sys.stdout.write(json.dumps(seconds))
        sys.stdout.flush()
        os._exit(0)  # nothing is to be saved

    train.fit, log.TrainingLog.end_step = fit_once, end_step
    train.main([recipe])


if __name__ == "__main__":
    main(sys.argv[1])
