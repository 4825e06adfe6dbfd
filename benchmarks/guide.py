"""Parts of the Hugging Face guide to speech recognition, after its description: what batches are made of, and how.

https://huggingface.co/docs/transformers/tasks/asr
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Wav2Vec2Processor

from asr_train.data.corpus import Corpus
from asr_train.geometry import SAMPLE_RATE


@dataclass(frozen=True)
class Collator:
    """Rows of the prepared data set, padded to the longest: waveforms by the processor, labels with -100."""

    processor: Any

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_values` float32 [B, S] and `labels` int64 [B, L]."""
        waveforms = [{"input_values": row["input_values"][0]} for row in rows]
        batch = dict(self.processor.pad(waveforms, padding="longest", return_tensors="pt"))
        labels = self.processor.pad(labels=[{"input_ids": row["labels"]} for row in rows], padding="longest",
                                    return_tensors="pt")  # fmt: skip
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"].ne(1), -100)
        return batch


def processor_of(corpus: Corpus) -> Any:
    """The processor that a corpus was prepared with."""
    return Wav2Vec2Processor.from_pretrained(corpus.processor_dir)


def prepared(corpus: Corpus, folder: Path) -> Dataset:
    """The guide's data set of a corpus's training utterances, on disk: normalised waveforms as lists of float32."""
    processor = processor_of(corpus)
    train = corpus.train

    def rows() -> Iterator[dict[str, Any]]:
        for row in range(len(train)):
            waveform = train.waveform(row).astype("float32") / 32768
            values = processor(waveform, sampling_rate=SAMPLE_RATE).input_values  # [1, num_samples], and kept so
            yield {"input_values": values, "labels": train.labels(row).tolist(), "input_length": len(values[0])}

    found: Any = Dataset.from_generator(rows, cache_dir=str(folder))
    return found
