"""The prepared corpus of a run, where it still is: its summary, its lengths, and clips of what was evaluated."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from asr_train.data.corpus import Corpus, CorpusSet
from asr_train.errors import CorpusError
from asr_train.files import read_json
from asr_train.geometry import SAMPLE_RATE
from launch.report.reading import Record


@dataclass(frozen=True)
class Speech:
    """The corpus that a run was trained on."""

    corpus: Corpus

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """Set -> rows, hours, rejected (reason -> rows), examples (reason -> one row); as `prepare` counted them."""
        sets: Mapping[str, Any] = self.corpus.info["sets"]
        return sets

    def durations_s(self, set_name: str) -> npt.NDArray[np.float64]:
        """Seconds of every utterance of a set."""
        return np.asarray(self.corpus.sets[set_name].num_samples, dtype=np.float64) / SAMPLE_RATE


@dataclass
class Clips:
    """Audio of utterances as data URLs, worst first, until a number of bytes is used up.

    FLAC: what the model heard, to the sample, in half the bytes of WAV; every browser of today plays it.
    """

    limit_bytes: int
    used_bytes: int = 0
    num_left_out: int = 0
    found: dict[tuple[str, str], str] = field(default_factory=dict)  # (set, id) -> URL

    def add(self, corpus_set: CorpusSet, ids: Sequence[str]) -> None:
        """Add clips of a set.

        Raises:
            CorpusError: the set cannot be read.
        """
        rows = _rows_of(corpus_set, set(ids))
        for name in ids:
            if name not in rows:
                self.num_left_out += 1
                continue
            stream = io.BytesIO()
            soundfile.write(stream, corpus_set.waveform(rows[name]), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            url = "data:audio/flac;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
            if self.used_bytes + len(url) > self.limit_bytes:
                self.num_left_out += 1
                continue
            self.used_bytes += len(url)
            self.found[corpus_set.name, name] = url


def open_speech(record: Record) -> tuple[Speech | None, str]:
    """The corpus of a run, and a sentence that says why there is none.

    It is known by its hash: another one under the same name, prepared again with other data, is not shown for it.
    """
    data = record.values.get("data")
    root = data.get("corpus_root") if isinstance(data, Mapping) else None
    wanted = record.latest("corpus_hash")
    if wanted is None:
        return None, "The run's lines do not name its corpus; an older version wrote them."
    for path in sorted(Path(str(root)).glob("*/corpus.json")):
        with suppress(OSError, ValueError, AttributeError, KeyError, CorpusError):
            if read_json(path).get("hash") == wanted:
                return Speech(Corpus.open(path.parent)), ""
    return None, f"The corpus that it was trained on is no longer in {root}."


def _rows_of(corpus_set: CorpusSet, wanted: set[str]) -> dict[str, int]:
    """Id -> row, of a few utterances; ids lie in the mapped shards, and no audio is read."""
    return {name: row for row in range(len(corpus_set)) if (name := corpus_set.id(row)) in wanted}
