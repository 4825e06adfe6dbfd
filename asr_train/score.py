"""Scoring a set: every utterance once, on any number of ranks, each hypothesis cut at its own frames.

Batches are a function of the set alone, so scores do not follow the number of processes. Only best labels leave the
device; logits live as long as their batch. Counts are summed over ranks; rows are written by each rank and merged.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from asr_train.data.batch import Batch, input_values, make_batch
from asr_train.data.corpus import CorpusSet
from asr_train.data.plan import Unit
from asr_train.data.text import Normaliser, Vocabulary
from asr_train.errors import RecipeError
from asr_train.files import atomic_file, read_jsonl
from asr_train.geometry import SAMPLE_RATE
from asr_train.metrics import (
    METRIC_MODULES,
    EditCounts,
    align_words,
    count_characters,
    count_confusions,
    count_words,
    most_frequent,
)
from asr_train.model import SpeechModel

_NUM_CONFUSIONS = 20


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """How well a set was recognised.

    `words` and `characters` are counted against references as the recipe normalises them, `words_raw` and
    `characters_raw` against references as they came. `num_refused` rows had no audio that decodes, or no reference.
    """

    words: EditCounts
    characters: EditCounts
    words_raw: EditCounts
    characters_raw: EditCounts
    num_rows: int
    num_refused: int
    confusions: Sequence[tuple[str | None, str | None, int]]  # reference word, hypothesis word, count
    metrics: Mapping[str, float] = field(default_factory=dict)  # further `evaluate` metrics

    @property
    def wer(self) -> float:
        """Word error rate; 0.1 is 10 %."""
        return self.words.error_rate

    @property
    def cer(self) -> float:
        """Character error rate."""
        return self.characters.error_rate

    @property
    def wer_raw(self) -> float:
        """Word error rate against references as they came."""
        return self.words_raw.error_rate

    @property
    def cer_raw(self) -> float:
        """Character error rate against references as they came."""
        return self.characters_raw.error_rate

    def to_json(self) -> dict[str, Any]:
        """Plain values, as an evaluation line of metrics.jsonl holds them."""
        return {
            "wer": self.wer,
            "cer": self.cer,
            "wer_raw": self.wer_raw,
            "cer_raw": self.cer_raw,
            **self.metrics,
            "num_rows": self.num_rows,
            "num_refused": self.num_refused,
            "words": asdict(self.words),
            "characters": asdict(self.characters),
            "confusions": [list(confusion) for confusion in self.confusions],
        }


def evaluate_set(
    model: nn.Module,
    corpus_set: CorpusSet,
    vocabulary: Vocabulary,
    normaliser: Normaliser,
    *,
    unit_audio_s: float,
    equal_lengths: bool,
    accelerator: Accelerator,
    out: Path | None,
) -> SetScore:
    """Transcribe and score a whole set; every rank calls this and gets the same score.

    Args:
        model: a `SpeechModel`, wrapped by accelerate or not; it is left in the mode it came in.
        corpus_set: what to score.
        vocabulary: the model's.
        normaliser: applied to the references as they came.
        unit_audio_s: padded seconds a batch holds at most, unless one utterance alone is longer.
        equal_lengths: never pad, for models whose outputs change with padding.
        accelerator: the processes that share the work.
        out: JSONL file of every row, worst first, on a disk that all ranks see; None writes none.
    """
    speech_model: SpeechModel = accelerator.unwrap_model(model)
    units = evaluation_units(corpus_set.num_samples, unit_audio_s, equal_lengths=equal_lengths)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    tally = _Tally(normaliser)
    with ExitStack() as stack:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            tally.rows = stack.enter_context(_rank_file(out, rank).open("w", encoding="utf-8"))
        for batch, utterances in _turns(speech_model, corpus_set, units, rank, world_size):
            frame_ids = _best_labels(model, batch.to(accelerator.device), accelerator)
            for utterance, ids, num_frames in zip(utterances, frame_ids, batch.num_frames.tolist(), strict=False):
                tally.add(utterance, vocabulary.decode_frames(ids[:num_frames]))
    score = tally.sum_over_ranks(accelerator, corpus_set)
    if out is not None:
        accelerator.wait_for_everyone()
        if rank == 0:
            _merge(out, world_size)
        accelerator.wait_for_everyone()
    return score


def add_metrics(
    score: SetScore, names: Sequence[str], rows: Path, accelerator: Accelerator, *, trust_remote_code: bool
) -> SetScore:
    """The score with further `evaluate` metrics of the rows that `evaluate_set` wrote; every rank calls this.

    A name is one that ships (`wer`, `cer`), a path, or one of the hub's; names that are paths shorten to the last part.

    Raises:
        RecipeError: they are programs, and `trust_remote_code` is off; or one cannot be loaded or computed.
    """
    if not names:
        return score
    if not trust_remote_code:
        raise RecipeError(f"eval.metrics: {', '.join(names)}: metrics are programs; set trust_remote_code: true")
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [{key: value for name in names for key, value in _compute_metric(name, rows).items()}]
        except RecipeError as error:
            outcome = [str(error)]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], str):
        raise RecipeError(outcome[0])
    return replace(score, metrics=outcome[0])


def evaluation_units(num_samples: npt.NDArray[np.int64], unit_audio_s: float, *, equal_lengths: bool) -> list[Unit]:
    """Batches of a set, longest utterances first: a batch too big for memory shows at once, the last are cheap."""
    order = np.lexsort((np.arange(len(num_samples)), -num_samples))
    units: list[Unit] = []
    start = 0
    while start < len(order):
        longest = int(num_samples[order[start]])
        size = max(1, int(unit_audio_s * SAMPLE_RATE) // longest)
        ids = order[start : start + size]
        if equal_lengths:
            ids = ids[num_samples[ids] == longest]
        units.append(Unit(ids=ids, padded_samples=longest))
        start += len(ids)
    return units


class _Utterance(NamedTuple):
    """What a row of the output says of the utterance."""

    id: str
    raw_reference: str
    duration_s: float


def _turns(
    model: SpeechModel, corpus_set: CorpusSet, units: Sequence[Unit], rank: int, world_size: int
) -> Iterator[tuple[Batch, list[_Utterance]]]:
    """This rank's batches, each read while the one before it is computed, with their utterances.

    Every rank takes as many turns, for a forward pass of a sharded model is a collective; in an idle turn it computes
    the cheapest batch, without utterances.
    """
    if not units:
        return
    num_turns = -(-len(units) // world_size)

    def read(turn: int) -> tuple[Batch, list[_Utterance]]:
        number = turn * world_size + rank
        is_idle = number >= len(units)
        unit = units[-1 if is_idle else number]
        batch = make_batch(corpus_set, unit, model.batch_settings, None)
        rows = [] if is_idle else unit.ids.tolist()
        durations_s = (batch.num_samples / SAMPLE_RATE).tolist()
        return batch, [
            _Utterance(corpus_set.id(row), corpus_set.raw_text(row), duration_s)
            for row, duration_s in zip(rows, durations_s, strict=False)
        ]

    with ThreadPoolExecutor(1) as reader:  # the one thread that touches the corpus
        ahead = reader.submit(read, 0)
        for turn in range(num_turns):
            found = ahead.result()
            if turn + 1 < num_turns:
                ahead = reader.submit(read, turn + 1)
            yield found


def _best_labels(model: nn.Module, batch: Batch, accelerator: Accelerator) -> npt.NDArray[np.int32]:
    """Best label of every frame, int32 [B, F] on the host; the logits stay on the device and die here."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            logits = model(input_values(batch), batch.num_samples)  # [B, F, V]
        labels: npt.NDArray[np.int32] = logits.argmax(dim=-1).to(torch.int32).cpu().numpy()
        return labels
    finally:
        model.train(was_training)


class _Tally:
    """One rank's counts, confusions and rows."""

    def __init__(self, normaliser: Normaliser) -> None:
        self._normaliser = normaliser
        self._counts = [EditCounts()] * 4  # words, characters, words_raw, characters_raw
        self._num_rows = 0
        self._confusions: Counter[tuple[str | None, str | None]] = Counter()
        self.rows: IO[str] | None = None

    def add(self, utterance: _Utterance, hypothesis: str) -> None:
        """Score one utterance."""
        raw_reference = utterance.raw_reference
        reference = self._normaliser(raw_reference)
        words, edits = align_words(reference, hypothesis)
        found = [
            words,
            count_characters([reference], [hypothesis]),
            count_words([raw_reference], [hypothesis]),
            count_characters([raw_reference], [hypothesis]),
        ]
        self._counts = [total + counts for total, counts in zip(self._counts, found, strict=True)]
        self._num_rows += 1
        self._confusions.update(count_confusions(edits))
        if self.rows is not None:
            line = {
                "id": utterance.id,
                "wer": words.error_rate,
                "num_errors": words.num_errors,
                "reference": reference,
                "hypothesis": hypothesis,
                "raw_reference": raw_reference,
                "duration_s": round(utterance.duration_s, 3),
                **asdict(words),
                "alignment": edits,
            }
            self.rows.write(json.dumps(line, ensure_ascii=False) + "\n")

    def sum_over_ranks(self, accelerator: Accelerator, corpus_set: CorpusSet) -> SetScore:
        """The score of the whole set, the same on every rank."""
        numbers = [self._num_rows, *(number for counts in self._counts for number in astuple(counts))]
        totals = torch.tensor(numbers, dtype=torch.int64, device=accelerator.device)
        num_rows, *flat = accelerator.reduce(totals, "sum").tolist()
        assert num_rows == len(corpus_set), f"{num_rows} of {len(corpus_set)} rows were scored"
        words, characters, words_raw, characters_raw = (EditCounts(*flat[at : at + 4]) for at in range(0, 16, 4))
        confusions: Counter[tuple[str | None, str | None]] = Counter()
        for pair, count in gather_object(list(self._confusions.items())):
            confusions[pair] += count
        return SetScore(
            words=words,
            characters=characters,
            words_raw=words_raw,
            characters_raw=characters_raw,
            num_rows=num_rows,
            num_refused=corpus_set.num_refused,
            confusions=most_frequent(confusions, _NUM_CONFUSIONS),
        )


def _rank_file(out: Path, rank: int) -> Path:
    return out.with_name(f".{out.name}.rank-{rank}")


def _merge(out: Path, world_size: int) -> None:
    """Merge the ranks' rows, worst first: by WER, then errors, then id. Only keys and offsets are kept in memory."""
    with ExitStack() as stack:
        streams = [stack.enter_context(_rank_file(out, rank).open("rb")) for rank in range(world_size)]
        keys: list[tuple[float, int, str, int, int]] = []
        for number, stream in enumerate(streams):
            offset = 0
            for line in stream:
                row = json.loads(line)
                keys.append((-row["wer"], -row["num_errors"], row["id"], number, offset))
                offset += len(line)
        with atomic_file(out) as merged:
            for *_, number, offset in sorted(keys):
                streams[number].seek(offset)
                merged.write(streams[number].readline())
    for leftover in out.parent.glob(f".{out.name}.rank-*"):  # also of an attempt with more ranks
        leftover.unlink()


def check_metrics(names: Sequence[str], *, trust_remote_code: bool) -> None:
    """Load further metrics once, before a training that will need them.

    Raises:
        RecipeError: one cannot be loaded.
    """
    for name in names if trust_remote_code else ():
        try:
            _load_metric(name)
        except Exception as error:  # a metric is somebody's program: anything can come out of it
            raise RecipeError(f"eval.metrics: {name!r}: {type(error).__name__}: {error}") from error


def _load_metric(name: str) -> Any:
    import evaluate  # noqa: PLC0415 - seconds, with datasets, pandas and scipy, that most runs have no use for

    shipped = METRIC_MODULES / name
    return evaluate.load(str(shipped) if shipped.is_dir() else name)


def _compute_metric(name: str, rows: Path) -> dict[str, float]:
    """One `evaluate` metric over the rows of a file: name -> value of every number that it gives."""
    try:
        metric = _load_metric(name)
        for row in read_jsonl(rows):
            metric.add(prediction=row["hypothesis"], reference=row["reference"])
        found = metric.compute()
    except Exception as error:  # a metric is somebody's program: anything can come out of it
        raise RecipeError(f"eval.metrics: {name!r}: {type(error).__name__}: {error}") from error
    return {key: float(value) for key, value in (found or {}).items() if isinstance(value, (int, float))}
