import os
import subprocess
import sys
from collections import Counter

import jiwer
import pytest

from asr_train.metrics import (
    METRIC_MODULES,
    EditCounts,
    align_words,
    count_characters,
    count_confusions,
    count_words,
    most_frequent,
    render_alignment,
)

REFERENCES = ["i want to pay my bill", "", "pay", "what is my balance", "zürich  bank"]
HYPOTHESES = ["i want pay the bill", "uh", "", "what is my balance", "zurich bank now"]


def test_counts_by_hand():
    # i want [to] pay my->the bill | +uh | [pay] | 4 hits | zürich->zurich bank +now
    assert count_words(REFERENCES, HYPOTHESES) == EditCounts(hits=9, substitutions=2, deletions=2, insertions=2)


def test_sums_of_single_pairs_equal_jiwer_on_the_whole():
    words, characters = EditCounts(), EditCounts()
    for reference, hypothesis in zip(REFERENCES, HYPOTHESES, strict=True):
        words += count_words([reference], [hypothesis])
        characters += count_characters([reference], [hypothesis])
    assert words.error_rate == jiwer.wer(REFERENCES, HYPOTHESES)
    assert characters.error_rate == jiwer.cer(REFERENCES, HYPOTHESES)
    assert words.num_reference == 13


def test_nothing_to_recognise():
    assert count_words([""], [""]).error_rate == 0
    assert count_words([""], ["two words"]).error_rate == 2
    assert count_words([], []) == EditCounts()
    assert EditCounts().error_rate == 0


@pytest.mark.parametrize(("reference", "hypothesis"), list(zip(REFERENCES, HYPOTHESES, strict=True)))
def test_alignment_spells_both_texts(reference, hypothesis):
    counts, edits = align_words(reference, hypothesis)
    assert [word for _, word, _ in edits if word is not None] == reference.split()
    assert [word for _, _, word in edits if word is not None] == hypothesis.split()
    kinds = Counter(kind for kind, _, _ in edits)
    assert (
        EditCounts(kinds["="], kinds["S"], kinds["D"], kinds["I"]) == counts == count_words([reference], [hypothesis])
    )


def test_confusions_are_ordered_by_count_then_alphabet():
    edits = [("S", "a", "the"), ("=", "b", "b"), ("D", "to", None), ("S", "a", "the"), ("I", None, "uh")]
    assert most_frequent(count_confusions(edits), 2) == [("a", "the", 2), (None, "uh", 1)]


def test_alignment_in_columns():
    _, edits = align_words("i want to pay my bill", "i want pay the bill now")
    assert render_alignment(edits) == [
        ("i want to pay my  bill ***", "i want ** pay the bill now", "       D      S        I  ")
    ]
    assert render_alignment(edits, width=13) == [
        ("i want to pay", "i want ** pay", "       D     "),
        ("my  bill ***", "the bill now", "S        I  "),
    ]
    assert render_alignment(edits, width=1)[1] == ("want", "want", "    ")
    assert render_alignment([]) == []


def test_metric_modules_score_offline(tmp_path):
    """In a fresh process whose network use would fail, as `evaluate.load` of a path."""
    program = (
        "import socket\n"
        "def no(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = no\n"
        "import evaluate\n"
        f"for name in ('wer', 'cer'):\n"
        f"    metric = evaluate.load({str(METRIC_MODULES)!r} + '/' + name)\n"
        f"    metric.add_batch(predictions={HYPOTHESES[:3]!r}, references={REFERENCES[:3]!r})\n"
        f"    metric.add_batch(predictions={HYPOTHESES[3:]!r}, references={REFERENCES[3:]!r})\n"
        "    print(repr(metric.compute()[name]))\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    wer, cer = map(float, done.stdout.split())
    assert wer == jiwer.wer(REFERENCES, HYPOTHESES)
    assert cer == jiwer.cer(REFERENCES, HYPOTHESES)
