import json
import random

import numpy as np
import pytest
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

from asr_train.config import TextSettings
from asr_train.data.text import Normaliser, Vocabulary
from asr_train.errors import CorpusError
from asr_train.model_config import build_processor, load_vocabulary


def normalise(text, **settings):
    return Normaliser(TextSettings(**settings))(text)


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({}, "  I'd like  2\tcards,\nplease. ", "i'd like 2 cards, please."),
        ({"case": "upper"}, "Straße é", "STRASSE É"),
        ({"case": "keep"}, "Hello World", "Hello World"),
        ({"remove": ",.?!"}, "Well, well... why?", "well well why"),
        ({"remove": "a-z"}, "a-z hyphen", " hyphen".strip()),  # characters, no pattern: a, - and z
        ({"remove": ".*"}, "a.*b", "ab"),
        ({"remove": "É"}, "caf\u0065\u0301", "caf"),  # given composed and upper case, met decomposed and lower case
        ({"remove_digits": True}, "room 101 \u0663", "room"),
        ({"remove_apostrophes": True}, "don't don\u2019t", "dont dont"),
        ({"unicode_form": "NFD"}, "\u00e9", "e\u0301"),
        ({"unicode_form": "NFKC"}, "\ufb01ne\u00a0\u2460", "fine 1"),
        ({"remove": "!"}, " !! ", ""),
    ],
)
def test_normalisation(settings, text, expected):
    assert normalise(text, **settings) == expected


def test_normalised_text_stays_as_it_is():
    settings = {"unicode_form": "NFKC", "case": "lower", "remove": "-—"}
    for text in ("İstanbul — Ǆ ﬀ", "ΑΣ", "a\u00a0b"):
        once = normalise(text, **settings)
        assert normalise(once, **settings) == once


def test_built_vocabulary_has_the_blank_first_and_each_character_once():
    vocabulary = Vocabulary.build(["hi there", "i'm 2"])
    assert vocabulary.tokens == ("[PAD]", "[UNK]", "|", "'", "2", "e", "h", "i", "m", "r", "t")
    assert vocabulary.blank_id == 0
    assert vocabulary.encode("hi m") == [6, 7, 2, 8]
    assert vocabulary.encode("hx") == [6, 1]
    assert vocabulary.unknown("x hi yx") == ["x", "y"]
    assert vocabulary.without_unknown("x hi yx e") == "hi e"


@pytest.mark.parametrize("text", ["yes | no", "a [PAD] b", "an [UNK]"])
def test_texts_that_collide_with_special_tokens_are_refused(text):
    with pytest.raises(CorpusError, match=r"text\.remove") as caught:
        Vocabulary.build(["fine", text])
    assert repr(text) in str(caught.value)


def test_decoding_groups_repeats_and_drops_blanks():
    vocabulary = Vocabulary.build(["helo"])
    ids = [vocabulary.tokens.index(token) for token in "helo"]
    h, e, l, o = ids  # noqa: E741
    assert vocabulary.decode_frames([0, h, h, e, l, l, 0, l, o, o, 2, 2, 0]) == "hello"
    assert vocabulary.decode([h, e, l, l, o]) == "hello"
    assert vocabulary.decode_frames(np.array([], dtype=np.int64)) == ""


def tokenizer_of(tokens, folder, **special):
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **special)


GUIDE = {"unk_token": "[UNK]", "pad_token": "[PAD]", "word_delimiter_token": "|"}  # adds <s> and </s> at the end
TOKENIZERS = {
    "base-960h": (["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAOIN'"], {}),
    "guide": ([*"aeinot'", "|", "[UNK]", "[PAD]"], GUIDE),
    "lower-casing": (["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAOIN'"], {"do_lower_case": True}),
    "long tokens": (["<pad>", "<s>", "</s>", "<unk>", "|", *"aeinot", "tion", "ti"], {}),
    "no begin or end": (["[PAD]", "[UNK]", "|", *"aeinot"], {**GUIDE, "bos_token": None, "eos_token": None}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_gives_the_same_ids_and_texts(name, tmp_path):
    tokens, special = TOKENIZERS[name]
    tokenizer = tokenizer_of(tokens, tmp_path, **special)
    tokenizer.save_pretrained(tmp_path / "saved")
    vocabulary = Vocabulary.from_tokenizer_dir(tmp_path / "saved")
    assert vocabulary.size == len(tokenizer)
    assert vocabulary.blank_id == tokenizer.pad_token_id
    for text in ("ten nations", "a native", "NINE ONE", "it's x", "tititon"):
        assert vocabulary.encode(text) == tokenizer(text).input_ids, text
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.randrange(vocabulary.size) for _ in range(generator.randrange(30))]
        ids = [number for number in ids for _ in range(generator.randrange(1, 3))]
        assert vocabulary.decode_frames(ids) == tokenizer.decode(ids), ids
        assert vocabulary.decode(ids) == tokenizer.decode(ids, group_tokens=False), ids


def test_the_saved_processor_is_read_by_transformers(tmp_path, tiny_corpus):
    processor = Wav2Vec2Processor.from_pretrained(tiny_corpus.processor_dir)
    vocabulary = tiny_corpus.vocabulary
    assert Vocabulary.from_tokenizer_dir(tiny_corpus.processor_dir) == vocabulary
    for row in range(len(tiny_corpus.train)):
        text, labels = tiny_corpus.train.text(row), tiny_corpus.train.labels(row).tolist()
        assert processor(text=text).input_ids == labels
        assert processor.decode(labels, group_tokens=False) == text
    frames = [0, 5, 5, 0, 5, 2, 2, 1, 4, 2, 0]
    assert vocabulary.decode_frames(frames) == processor.decode(frames)
    build_processor(vocabulary, processor.feature_extractor).save_pretrained(tmp_path)
    assert load_vocabulary(str(tmp_path)) == vocabulary


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="not the folder of a saved CTC tokenizer"):
        Vocabulary.from_tokenizer_dir(tmp_path)


def test_ids_with_holes_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "|": 1, "a": 4}')
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    with pytest.raises(CorpusError, match="without holes"):
        Vocabulary.from_tokenizer_dir(tmp_path)


def test_without_unknown_token_unknown_text_is_refused():
    vocabulary = Vocabulary(("<pad>", "|", "a"), pad="<pad>", unk=None)
    assert vocabulary.encode("a a") == [2, 1, 2]
    with pytest.raises(CorpusError, match="no token for b"):
        vocabulary.encode("ab")


def test_vocabulary_survives_json():
    vocabulary = Vocabulary.build(["grüße dich"])
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary
