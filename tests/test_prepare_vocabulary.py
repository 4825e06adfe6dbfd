"""The vocabulary of a corpus, made or given, and the labels in it."""

import json

import pytest
from bad_rows import rejected
from conftest import encoded, speech, write_jsonl
from transformers import Wav2Vec2CTCTokenizer

from asr_train.errors import CorpusError
from asr_train.prepare import prepare


def manifest_of(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.wav").write_bytes(encoded(speech(text or "a", 2.0, seed=number)))
    rows = [{"id": f"r{number}", "audio": f"{number}.wav", "text": text} for number, text in enumerate(texts)]
    return {"kind": "jsonl", "path": str(write_jsonl(folder / "m.jsonl", rows))}


def upper_tokenizer(folder, **special):
    folder.mkdir()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABDEHLORW'"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **special).save_pretrained(folder)
    return str(folder)


def test_the_vocabulary_comes_from_training_texts_alone(tiny_recipe, tmp_path):
    train, dev = manifest_of(tmp_path / "t", ["abba", "a cab"]), manifest_of(tmp_path / "d", ["dab", "abc"])
    recipe = tiny_recipe(**{"data.train": train, "eval.sets": {"dev": dev}, "data.corpus_root": str(tmp_path)})
    corpus = prepare(recipe, progress=False)
    assert corpus.vocabulary.tokens == ("[PAD]", "[UNK]", "|", "a", "b", "c")
    dev_set = corpus.sets["dev"]
    assert dev_set.labels(0).tolist() == []  # d is unknown: kept, scored, without labels
    assert dev_set.text(0) == "dab"
    assert dev_set.labels(1).tolist() == [3, 4, 5]
    assert dev_set.num_labels.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("policy", "train_texts", "dev_text", "dev_labels"),
    [
        ("reject", ["HELLO"], "ZEBRA", []),
        ("remove", ["HELLO", "BRAED"], "ZEBRA", "EBRA"),
        ("unk", ["HELLO", "BRAZED"], "ZEBRA", "<unk>EBRA"),
        (None, ["HELLO", "BRAZED"], "ZEBRA", "<unk>EBRA"),
    ],
)
def test_characters_outside_a_given_vocabulary(tiny_recipe, tmp_path, policy, train_texts, dev_text, dev_labels):
    changes = {
        "text.processor": upper_tokenizer(tmp_path / "p"),
        "text.case": "upper",
        "text.unknown_characters": policy,
        "data.train": manifest_of(tmp_path / "t", ["hello", "brazed"]),
        "eval.sets": {"dev": manifest_of(tmp_path / "d", ["zebra"])},
        "data.corpus_root": str(tmp_path),
        "data.max_rejected_percent": 50,
    }
    corpus = prepare(tiny_recipe(**changes), progress=False)
    assert [corpus.train.text(row) for row in range(len(corpus.train))] == train_texts
    dev = corpus.sets["dev"]
    assert dev.text(0) == dev_text  # the reference stays whole
    ids = {token: number for number, token in enumerate(corpus.vocabulary.tokens)}
    expected = [ids["<unk>"], *(ids[c] for c in "EBRA")] if "<unk>" in dev_labels else [ids[c] for c in dev_labels]
    assert dev.labels(0).tolist() == expected
    if policy == "reject":
        entry = rejected(corpus.path)[0]
        assert (entry["id"], entry["reason"], entry["value"]) == ("r1", "unknown characters", "Z")
    assert "Z x1" in (corpus.path / "summary.txt").read_text()


def test_texts_in_the_wrong_case_for_a_given_vocabulary_are_refused(tiny_recipe, tmp_path):
    """With `unk` every label would be [UNK], and training would go on in silence."""
    changes = {"text.processor": upper_tokenizer(tmp_path / "p"), "data.corpus_root": str(tmp_path)}
    with pytest.raises(CorpusError, match=r"lacks \d+ % .*text\.case: lower"):
        prepare(tiny_recipe(**changes), progress=False)


@pytest.mark.parametrize("processor", [False, True])
def test_a_word_delimiter_in_transcripts_is_refused_unless_removed(tiny_recipe, tmp_path, processor):
    changes = {"data.train": manifest_of(tmp_path / "t", ["all bad", "all | old"]), "data.corpus_root": str(tmp_path)}
    changes |= {"eval.sets": {}, "text.case": "upper"}
    if processor:
        changes["text.processor"] = upper_tokenizer(tmp_path / "p")
    with pytest.raises(CorpusError, match=r"'\|' in 'ALL \| OLD'"):
        prepare(tiny_recipe(**changes), progress=False)
    corpus = prepare(tiny_recipe(**changes, **{"text.remove": "|"}), progress=False)
    assert corpus.train.text(1) == "ALL OLD"


def test_labels_in_alignment_are_those_after_normalisation(tiny_recipe, tmp_path):
    """25 frames for 27 characters: unalignable as it came, alignable once the digits are removed."""
    folder = tmp_path / "t"
    source = manifest_of(folder, ["abc"])
    (folder / "0.wav").write_bytes(encoded(speech("abc", 0.51)))
    rows = [{"id": "r0", "audio": "0.wav", "text": "abc 01234567890123456789012345"}]
    write_jsonl(folder / "m.jsonl", rows)
    changes = {"data.train": source, "eval.sets": {}, "data.corpus_root": str(tmp_path)}
    with pytest.raises(CorpusError, match="unalignable 1"):
        prepare(tiny_recipe(**changes), progress=False)
    assert len(prepare(tiny_recipe(**changes, **{"text.remove_digits": True}), progress=False).train) == 1
