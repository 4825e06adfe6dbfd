"""Real recordings: Debian's telephone prompts through `recipes/telephone.yaml`; the counts are those of the files."""

import gzip
import os
from collections import Counter

import pytest
import soundfile
from conftest import RATE

from asr_train.data import telephone
from asr_train.errors import CorpusError, run_main
from asr_train.files import read_jsonl
from asr_train.prepare import prepare
from asr_train.recipe import load_recipe

installed = pytest.mark.skipif(
    not (telephone.TEXTS.is_file() and telephone.SOUNDS.is_dir()) and not os.environ.get("CI"),
    reason="needs the Debian packages asterisk-core-sounds-en-wav and asterisk-core-sounds-en; CI fails without them",
)
SOUNDS = [  # recordings of no speech
    "ascending-2tone", "beep", "beeperr", "confbridge-join", "confbridge-leave", "descending-2tone", "tt-monkeys",
    *(f"silence/{seconds}" for seconds in range(1, 11)),
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("telephone")
    assert run_main(telephone.main, [str(folder / "telephone.jsonl")]) == 0
    path = f"path={folder / 'telephone.jsonl'}"
    overrides = [f"data.train.{path}", f"eval.sets.prompts.{path}", f"data.corpus_root={folder}"]
    return prepare(load_recipe("telephone", overrides), progress=False)


@installed
def test_the_report_on_real_recordings_is_right(corpus):
    refused = {entry["id"]: (entry["reason"], entry["value"]) for entry in read_jsonl(corpus.path / "rejected.jsonl")}
    assert refused == {
        **dict.fromkeys(SOUNDS, ("empty text", "''")),
        "demo-congrats": ("too long", "30.277 s"),
        "demo-instruct": ("too long", "73.349 s"),
        "priv-callee-options": ("too long", "31.131 s"),
        "pls-try-call-later": ("missing file", str(telephone.SOUNDS / "pls-try-call-later.wav")),
    }
    rows = {name: len(found) for name, found in corpus.sets.items()}
    assert rows == {"train": 491, "prompts": 57}
    reasons = Counter(reason for reason, _ in refused.values())
    assert corpus.info["sets"]["train"]["rejected"] == reasons == {"empty text": 17, "too long": 3, "missing file": 1}
    text = (corpus.path / "summary.txt").read_text()
    assert "│ train   │       491 │  0.34 │           21 │      4.10 │" in text
    assert "│ Activated. " in text


@installed
def test_every_recording_is_in_the_corpus_once_at_16_khz(corpus):
    """With the rows refused, the sets hold every recording of the package, each as long as its file."""
    found = {}
    for part in corpus.sets.values():
        for row in range(len(part)):
            assert part.id(row) not in found
            found[part.id(row)] = int(part.num_samples[row]) / RATE
    recorded = {path.relative_to(telephone.SOUNDS).with_suffix("").as_posix(): soundfile.info(path).duration
                for path in telephone.SOUNDS.rglob("*.wav")}  # fmt: skip
    refused = {entry["id"] for entry in read_jsonl(corpus.path / "rejected.jsonl")} - {"pls-try-call-later"}
    assert found.keys() | refused == recorded.keys()
    assert all(abs(seconds - recorded[name]) < 1e-3 for name, seconds in found.items())


@installed
def test_digits_stay_and_brackets_go(corpus):
    texts = {part.id(row): part.text(row) for part in corpus.sets.values() for row in range(len(part))}
    assert texts["confbridge-binaural-on"] == "3d audio enabled"
    assert texts["letters/dollar"] == "dollar"
    assert texts["spy-iax2"] == "iax"
    assert texts["digits/0"] == "zero"
    assert not any(set(text) & set('[]()<>.,"') for text in texts.values())


def test_texts_and_recordings_without_each_other_are_rows(tmp_path):
    with gzip.open(tmp_path / "t.gz", "wt") as stream:
        stream.write("; comment: no row\n\nhello: Hello [waves] you: two  spaces.\nsub/gone: Gone\nhum: (a hum)\n")
    (tmp_path / "s" / "sub").mkdir(parents=True)
    for name in ("hello", "hum", "sub/extra"):
        (tmp_path / "s" / f"{name}.wav").touch()
    texts = {row["id"]: row["text"] for row in telephone.rows(tmp_path / "t.gz", tmp_path / "s")}
    assert texts == {"hello": "Hello you: two spaces.", "sub/gone": "Gone", "hum": "", "sub/extra": ""}


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(CorpusError, match="apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en"):
        list(telephone.rows(tmp_path / "gone.gz", tmp_path))
