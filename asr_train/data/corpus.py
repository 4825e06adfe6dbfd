"""The prepared corpus on disk, memory-mapped: lengths, texts, labels, waveforms. `prepare.py` writes it.

<corpus_root>/<name>-<hash8>/
    corpus.json            written last: what made it, counts, vocabulary, geometry
    processor/             what transformers' Wav2Vec2Processor.from_pretrained reads
    <set>/shard-00000.arrow ...   Arrow streams that `datasets.Dataset.from_file` reads too
    <set>/num_samples.npy, num_labels.npy    int64 [N], in row order
    <set>/shard_rows.npy                     int64, rows of each shard
    <set>/index/           the plan's index of lengths
    rejected.jsonl, summary.txt, summary.json
"""

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from asr_train.config import Recipe
from asr_train.data.audio import from_flac
from asr_train.data.lengths import LengthIndex
from asr_train.data.text import Vocabulary
from asr_train.errors import CorpusError
from asr_train.files import hash_json, read_json
from asr_train.geometry import FrameGeometry
from asr_train.recipe import to_values

FORMAT = 1
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("audio", pa.large_binary()),  # PCM16 mono 16 kHz little endian, or FLAC of it
        pa.field("num_samples", pa.int64()),
        pa.field("text", pa.string()),  # normalised
        pa.field("raw_text", pa.string()),  # as it came
        pa.field("labels", pa.list_(pa.int32())),  # empty for an evaluation row that cannot be encoded
        pa.field("source", pa.string()),
    ]
)
_OPEN_SHARDS = 64  # mapped at once; a shard costs a few kB and one file descriptor
# what does not change the rows of a corpus, and so not its identity
_NOT_IDENTITY = ("corpus_root", "num_proc", "max_rejected_percent")


def corpus_identity(recipe: Recipe, geometry: FrameGeometry) -> dict[str, Any]:
    """Everything that decides what a corpus holds."""
    data = {key: value for key, value in to_values(recipe.data).items() if key not in _NOT_IDENTITY}
    sets = to_values(recipe.eval)["sets"]
    made_by = {"data": data, "text": to_values(recipe.text), "eval_sets": sets, "geometry": asdict(geometry)}
    return {"format": FORMAT, **made_by}


def corpus_path(recipe: Recipe, geometry: FrameGeometry) -> Path:
    """Where the corpus of a recipe is, or will be."""
    name = f"{recipe.name}-{hash_json(corpus_identity(recipe, geometry))[:8]}"
    return Path(recipe.data.corpus_root) / name


def set_names(recipe: Recipe) -> list[str]:
    """Names of a recipe's sets: train first."""
    return ["train", *recipe.eval.sets]


@dataclass(frozen=True)
class Corpus:
    """A complete corpus; opening it reads one JSON file."""

    path: Path
    info: dict[str, Any]  # corpus.json
    vocabulary: Vocabulary
    geometry: FrameGeometry
    sets: dict[str, "CorpusSet"]  # "train" and the evaluation sets

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a prepared corpus.

        Raises:
            CorpusError: missing, not complete, or of another format.
        """
        path = Path(path)
        try:
            info = read_json(path / "corpus.json")
        except (FileNotFoundError, NotADirectoryError):
            state = "is not complete: prepare was interrupted" if path.is_dir() else "does not exist"
            raise CorpusError(f"corpus {path} {state}; run `prepare` with its recipe") from None
        except ValueError as error:
            raise CorpusError(f"corpus {path}: corpus.json is damaged ({error}); delete it and run `prepare`") from None
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            found = info.get("format") if isinstance(info, dict) else None
            raise CorpusError(f"corpus {path} has format {found!r}, this program reads {FORMAT}; prepare it again")
        geometry = info["identity"]["geometry"]
        return cls(
            path=path,
            info=info,
            vocabulary=Vocabulary.from_json(info["vocabulary"]),
            geometry=FrameGeometry(kernels=tuple(geometry["kernels"]), strides=tuple(geometry["strides"])),
            sets={name: CorpusSet(path / name, info["identity"]["data"]["encoding"]) for name in info["sets"]},
        )

    @property
    def train(self) -> "CorpusSet":
        """The training set."""
        return self.sets["train"]

    @property
    def processor_dir(self) -> Path:
        """Folder of the saved Wav2Vec2Processor."""
        return self.path / "processor"

    @property
    def hash(self) -> str:
        """Hash, in hex, of what made the corpus: the recipe's fields, ids and texts of the training rows."""
        return str(self.info["hash"])


class CorpusSet:
    """One set of a corpus. Opening maps two arrays; shards are mapped when first read. Pickles as its path."""

    def __init__(self, path: Path, encoding: str = "pcm16") -> None:
        self.path = path
        self.name = path.name
        self._encoding = encoding
        self._shards: OrderedDict[int, tuple[list[int], list[pa.RecordBatch]]] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return CorpusSet, (self.path, self._encoding)

    def __len__(self) -> int:
        return len(self.num_samples)

    @cached_property
    def num_samples(self) -> npt.NDArray[np.int64]:
        """Samples of each utterance, int64 [N]."""
        return _mapped(self.path / "num_samples.npy")

    @cached_property
    def num_labels(self) -> npt.NDArray[np.int64]:
        """Labels of each utterance, int64 [N]."""
        return _mapped(self.path / "num_labels.npy")

    @cached_property
    def num_refused(self) -> int:
        """Rows of the sources that were refused; `rejected.jsonl` of the corpus names them."""
        return sum(read_json(self.path.parent / "corpus.json")["sets"][self.name]["rejected"].values())

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """First row of each shard, and the number of rows: int64 [num_shards + 1]."""
        return np.concatenate([[0], np.cumsum(_mapped(self.path / "shard_rows.npy"))]).astype(np.int64)

    @cached_property
    def index(self) -> LengthIndex:
        """The plan's index of lengths, memory-mapped."""
        return LengthIndex.open(self.path / "index")

    def id(self, row: int) -> str:
        """The utterance's id, unique in the set."""
        return str(self._value(row, "id"))

    def text(self, row: int) -> str:
        """The normalised transcript."""
        return str(self._value(row, "text"))

    def raw_text(self, row: int) -> str:
        """The transcript as it came."""
        return str(self._value(row, "raw_text"))

    def source(self, row: int) -> str:
        """Where the row came from."""
        return str(self._value(row, "source"))

    def labels(self, row: int) -> npt.NDArray[np.int32]:
        """Label ids, int32 [num_labels]; empty for an evaluation row that cannot be encoded."""
        batch, position = self._batch(row)
        return np.asarray(batch.column("labels")[position].values, dtype=np.int32)

    def waveform(self, row: int) -> npt.NDArray[np.int16]:
        """Mono 16 kHz samples, int16 [num_samples], read-only where the corpus keeps PCM16: a view of the file."""
        batch, position = self._batch(row)
        data = batch.column("audio")[position].as_buffer()
        return np.frombuffer(data, dtype="<i2") if self._encoding == "pcm16" else from_flac(memoryview(data))

    def _value(self, row: int, column: str) -> Any:
        batch, position = self._batch(row)
        return batch.column(column)[position].as_py()

    def _batch(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The record batch that holds a row, and the row's position in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in set {self.name}")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        starts, batches = self._shard(shard)
        within = row - int(self._starts[shard])
        number = bisect_right(starts, within) - 1
        return batches[number], within - starts[number]

    def _shard(self, shard: int) -> tuple[list[int], list[pa.RecordBatch]]:
        """First rows and record batches of a shard, mapped."""
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        batches = read_batches(shard_path(self.path, shard))
        starts = np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1].tolist()
        self._shards[shard] = starts, batches
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return starts, batches


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard of a set."""
    return folder / f"shard-{number:05d}.arrow"


def read_batches(path: Path) -> list[pa.RecordBatch]:
    """Record batches of an Arrow stream, memory-mapped.

    Raises:
        CorpusError: the file is missing or damaged.
    """
    try:
        return [batch for batch in pa.ipc.open_stream(pa.memory_map(str(path))) if batch.num_rows]
    except (OSError, pa.ArrowInvalid) as error:
        raise CorpusError(f"{path} cannot be read ({error}); delete the corpus and prepare it again") from None


def _mapped(path: Path) -> npt.NDArray[np.int64]:
    try:
        array: npt.NDArray[np.int64] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); delete the corpus and prepare it again") from None
    return array
