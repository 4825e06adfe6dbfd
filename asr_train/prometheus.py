"""A training's latest figures as a text file that Prometheus' node exporter collects (its `textfile` collector)."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from asr_train.errors import RecipeError, warn

_MEANINGS: Final = {
    "step": "updates that were made",
    "epoch": "epochs that are over",
    "loss": "CTC loss a label, mean over the utterances of the newest step",
    "grad_norm": "norm of the gradients before clipping",
    "lr": "learning rate of the head",
    "num_utterances": "utterances of the newest step",
    "audio_s": "seconds of audio in the newest step",
    "padded_audio_s": "the same with padding",
    "step_time_s": "seconds a step, mean since the training line before",
    "data_wait_s": "seconds a step that the loader was waited for, mean since the training line before",
    "audio_s_per_s": "seconds of audio without padding that were trained on in a second, all ranks",
    "memory_bytes": "peak of rank 0: of its GPU, else of its process",
    "num_infinite_losses": "utterances so far that could not be aligned",
    "num_skipped_steps": "updates so far that were skipped, for they were not finite",
    "loss_scale": "loss scale of fp16",
    "wer": "word error rate of an evaluation set, newest evaluation",
    "cer": "character error rate of an evaluation set, newest evaluation",
}
"""Name of a figure -> what it is; the ledger's are explained by their names."""


def check_prometheus(path: str) -> None:
    """Refuse a recipe that wants the file where the library is missing, or where the file cannot be written.

    Raises:
        RecipeError: prometheus-client is not installed, or the folder is not to be had.
    """
    try:
        import prometheus_client  # noqa: F401, PLC0415  an extra
    except ImportError:
        raise RecipeError("log.prometheus: needs prometheus-client: pip install 'wavefleet[trackers]'") from None
    folder = Path(path).parent
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
    raise RecipeError(f"log.prometheus: {path!r}: no file can be written in {folder}; name another, or null")


class PrometheusFile:
    """The figures so far as gauges `wavefleet_<name>{run="..."}`; those of an evaluation set say which one, too.

    Written in one rename, so that a collector never reads half of them. A file that cannot be written any more is
    warned of once: it is no reason to end a training.

    Args:
        path: the file; None writes nothing.
        run: name of the run's directory, which no other run has.
    """

    def __init__(self, path: str | None, run: str) -> None:
        self._path, self._run = path, run
        self._found: dict[tuple[str, str | None], float] = {}
        self._is_told = False

    def show(self, values: Mapping[str, float], *, evaluated: str | None = None) -> None:
        """Renew some figures, and write all; `evaluated` is the evaluation set that they are of."""
        if self._path is None:
            return
        self._found.update({(name, evaluated): value for name, value in values.items()})
        try:
            self._write(self._path)
        except OSError as error:
            if not self._is_told:
                warn(f"log.prometheus: {self._path} cannot be written: {error}; training goes on")
            self._is_told = True

    def _write(self, path: str) -> None:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile  # noqa: PLC0415  an extra

        registry = CollectorRegistry()
        gauges: dict[str, Gauge] = {}
        for (name, evaluated), value in self._found.items():
            labels = {"run": self._run, **({} if evaluated is None else {"set": evaluated})}
            if name not in gauges:
                gauges[name] = Gauge(
                    f"wavefleet_{re.sub('[^a-z0-9_]', '_', name)}", _meaning(name), list(labels), registry=registry
                )
            gauges[name].labels(**labels).set(value)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(path, registry)


def _meaning(name: str) -> str:
    group, _, part = name.partition("/")
    if group == "ledger" and part:
        return f"share of the attempt's time so far, all ranks: {part}"
    return _MEANINGS.get(name, name)
