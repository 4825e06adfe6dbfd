"""Word and character errors: counts that add up over utterances, batches and ranks; jiwer does the counting.

A rate is made only from summed counts, never from a mean of rates. Words are what stands between spaces; characters
include the spaces between words. Where there is nothing to recognise, the rate is the number of insertions (jiwer's
convention), so that an empty reference with an empty hypothesis scores 0.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import jiwer

METRIC_MODULES = Path(__file__).parent / "metric_modules"  # `evaluate.load(str(METRIC_MODULES / "wer"))`

# ("=", "the", "the"), ("S", "the", "a"), ("D", "the", None), ("I", None, "a")
Edit = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class EditCounts:
    """What it takes to turn hypotheses into references."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: "EditCounts") -> "EditCounts":
        return EditCounts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def num_reference(self) -> int:
        """Words, or characters, of the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def num_errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def error_rate(self) -> float:
        """WER, or CER: errors for each reference word or character; 0.1 is 10 %."""
        return self.num_errors / self.num_reference if self.num_reference else float(self.insertions)


def count_words(references: Sequence[str], hypotheses: Sequence[str]) -> EditCounts:
    """Word edits of pairs of texts, in all."""
    return _counts(jiwer.process_words(list(references), list(hypotheses))) if references else EditCounts()


def count_characters(references: Sequence[str], hypotheses: Sequence[str]) -> EditCounts:
    """Character edits of pairs of texts, in all."""
    return _counts(jiwer.process_characters(list(references), list(hypotheses))) if references else EditCounts()


def align_words(reference: str, hypothesis: str) -> tuple[EditCounts, list[Edit]]:
    """Word edits of one pair of texts, and the alignment they come from, word by word."""
    output = jiwer.process_words(reference, hypothesis)
    expected, heard = output.references[0], output.hypotheses[0]
    edits: list[Edit] = []
    for chunk in output.alignments[0]:
        left = expected[chunk.ref_start_idx : chunk.ref_end_idx]
        right = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        match chunk.type:
            case "delete":
                edits += [("D", word, None) for word in left]
            case "insert":
                edits += [("I", None, word) for word in right]
            case kind:
                letter = "=" if kind == "equal" else "S"
                edits += [(letter, word, other) for word, other in zip(left, right, strict=True)]
    return _counts(output), edits


def count_confusions(edits: Iterable[Edit]) -> Counter[tuple[str | None, str | None]]:
    """How often each word was taken for another; None stands for no word (deleted, inserted)."""
    return Counter((expected, heard) for kind, expected, heard in edits if kind != "=")


def most_frequent(
    confusions: Counter[tuple[str | None, str | None]], num: int
) -> list[tuple[str | None, str | None, int]]:
    """The `num` most frequent confusions: reference word, hypothesis word, count; ties in the order of the alphabet."""
    ordered = sorted(confusions.items(), key=lambda item: (-item[1], item[0][0] or "", item[0][1] or ""))
    return [(expected, heard, count) for (expected, heard), count in ordered[:num]]


def render_alignment(edits: Sequence[Edit], width: int = 120) -> list[tuple[str, str, str]]:
    """An alignment as blocks of three lines: reference, hypothesis, and the letters S, D, I below the errors.

    Words stand in columns; a block is at most `width` characters wide, unless one word alone is wider.
    """
    blocks: list[list[tuple[str, str, str]]] = []
    used = width
    for kind, expected, heard in edits:
        size = max(len(expected or ""), len(heard or ""))
        texts = (expected or "*" * size, heard or "*" * size, "" if kind == "=" else kind)
        if used + 1 + size > width:
            blocks.append([])
            used = -1
        first, second, third = (text.ljust(size) for text in texts)
        blocks[-1].append((first, second, third))
        used += 1 + size
    return [
        (" ".join(top), " ".join(middle), " ".join(low)) for top, middle, low in (zip(*b, strict=True) for b in blocks)
    ]


def _counts(output: Any) -> EditCounts:
    return EditCounts(output.hits, output.substitutions, output.deletions, output.insertions)
