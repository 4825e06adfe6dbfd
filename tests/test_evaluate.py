"""The right number: WER and CER of a set, whatever the batches and the number of processes."""

import json
import weakref
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from conftest import RATE, speech, write_jsonl
from ranks import run_ranks
from torch import nn
from transformers import Wav2Vec2Processor

from asr_train.data.batch import BatchSettings
from asr_train.data.text import Normaliser, Vocabulary
from asr_train.errors import RecipeError
from asr_train.files import read_jsonl
from asr_train.geometry import WAV2VEC2
from asr_train.metrics import align_words
from asr_train.model import build_model
from asr_train.prepare import prepare
from asr_train.score import add_metrics, evaluate_set, evaluation_units


@pytest.fixture(scope="module")
def hard_recipe(tiny_recipe, tmp_path_factory):
    """A recipe whose set `hard` has every kind of row: of 2 ms to 4 s, unalignable, outside the vocabulary, refused."""
    folder = tmp_path_factory.mktemp("hard")
    generator = np.random.default_rng(5)
    rows = [
        {"text": "Zürich, 12!", "duration": 0.9},
        {"text": "one two tree seven noon sell bill add a to tell soon", "duration": 0.2},  # more labels than frames
        {"text": "a", "duration": 0.002},  # not even one frame
        {"text": "Bill Bill", "duration": 1.5},
        {"text": "sell", "duration": 1.5},
    ]
    rows += [{"text": "Tell A BILL", "duration": float(generator.uniform(0.1, 4))} for _ in range(12)]
    for number, row in enumerate(rows):
        row["id"], row["audio_filepath"] = f"row-{number:02d}", f"{number}.wav"
        soundfile.write(folder / f"{number}.wav", speech(row["text"], row.pop("duration"), seed=number), RATE)
    rows.append({"text": "nothing to hear", "audio_filepath": "missing.wav", "id": "missing"})
    rows.append({"text": "", "audio_filepath": "0.wav", "id": "no text"})
    manifest = write_jsonl(folder / "manifest.jsonl", rows)
    return tiny_recipe(
        name="hard",
        **{"eval.sets": {"hard": {"kind": "jsonl", "path": str(manifest)}}, "data.max_rejected_percent": 50},
    )


@pytest.fixture(scope="module")
def hard(hard_recipe):
    corpus = prepare(hard_recipe, progress=False)
    assert len(corpus.sets["hard"]) == 17
    return corpus


def model_of(recipe, corpus, **config):
    changed = recipe.model.config | config
    model = build_model(
        type(recipe)(**{**vars(recipe), "model": type(recipe.model)(**{**vars(recipe.model), "config": changed})}),
        corpus.vocabulary,
        say=lambda _: None,
    )
    first, second = ([corpus.vocabulary.tokens.index(token) for token in pair] for pair in (("o", "b"), ("|", "a")))
    with torch.no_grad():  # what these weights like best, o and b, becomes the end of a word, and a word
        head = model.hf.lm_head.weight
        head[first + second] = head[second + first].clone() * 3
    return model


def score_of(model, corpus, recipe, out=None, unit_audio_s=6.0, equal_lengths=False, name="hard"):
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model) if accelerator.num_processes > 1 else model
    return evaluate_set(
        prepared, corpus.sets[name], corpus.vocabulary, Normaliser(recipe.text),
        unit_audio_s=unit_audio_s, equal_lengths=equal_lengths, accelerator=accelerator, out=out,
    )  # fmt: skip


def transcripts_by_transformers(model, corpus, name="hard"):
    """id -> text, each utterance alone, through nothing of ours but the weights."""
    processor = Wav2Vec2Processor.from_pretrained(corpus.processor_dir)
    corpus_set, hf = corpus.sets[name], model.hf.eval()
    texts = {}
    for row in range(len(corpus_set)):
        waveform = corpus_set.waveform(row).astype(np.float32) / 32768
        values = processor(audio=waveform, sampling_rate=RATE, return_tensors="pt").input_values
        if values.shape[1] < 400:
            texts[corpus_set.id(row)] = ""
            continue
        with torch.no_grad():
            texts[corpus_set.id(row)] = processor.tokenizer.decode(hf(values).logits[0].argmax(-1))
    return texts


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_wer_is_jiwers_on_the_whole_set_in_one_call(hard_recipe, hard, tmp_path, world_size):
    model = model_of(hard_recipe, hard)
    expected = transcripts_by_transformers(model, hard)
    assert len(set(" ".join(expected.values()).split())) > 10, expected
    out = tmp_path / "evaluations" / "hard.jsonl"
    scores = run_ranks(world_size, score_of, model, hard, hard_recipe, out)
    assert all(score == scores[0] for score in scores)
    score = scores[0]

    normalised = Normaliser(hard_recipe.text)
    corpus_set = hard.sets["hard"]
    raw = [corpus_set.raw_text(row) for row in range(len(corpus_set))]
    heard = [expected[corpus_set.id(row)] for row in range(len(corpus_set))]
    whole = jiwer.process_words([normalised(text) for text in raw], heard)
    assert score.wer == whole.wer
    assert (score.words.substitutions, score.words.deletions, score.words.insertions, score.words.hits) == (
        whole.substitutions, whole.deletions, whole.insertions, whole.hits,
    )  # fmt: skip
    assert score.cer == jiwer.cer([normalised(text) for text in raw], heard)
    assert score.wer_raw == jiwer.wer(raw, heard) != score.wer != 1
    assert score.cer_raw == jiwer.cer(raw, heard)
    assert (score.num_rows, score.num_refused) == (17, 2)

    rows = list(read_jsonl(out))
    assert {row["id"]: row["hypothesis"] for row in rows} == expected
    assert len(rows) == 17
    keys = [(-row["wer"], -row["num_errors"], row["id"]) for row in rows]
    assert keys == sorted(keys)
    for row in rows:
        assert row["wer"] == jiwer.wer(row["reference"], row["hypothesis"])
        assert [tuple(edit) for edit in row["alignment"]] == align_words(row["reference"], row["hypothesis"])[1]
    pairs = Counter((edit[1], edit[2]) for row in rows for edit in row["alignment"] if edit[0] != "=")
    assert score.confusions[0][2] == pairs.most_common(1)[0][1]
    assert all(pairs[left, right] == count for left, right, count in score.confusions)
    assert [path.name for path in out.parent.iterdir()] == ["hard.jsonl"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_models_that_padding_disturbs_are_never_padded(hard_recipe, hard, tmp_path, world_size):
    model = model_of(hard_recipe, hard, feat_extract_norm="group", do_stable_layer_norm=False)
    out = tmp_path / "hard.jsonl"
    run_ranks(world_size, score_of, model, hard, hard_recipe, out, 20.0, True)
    assert {row["id"]: row["hypothesis"] for row in read_jsonl(out)} == transcripts_by_transformers(model, hard)


class Oracle(nn.Module):
    """Says the reference of each utterance, which it knows by its first sample, and babbles on in the padding."""

    geometry = WAV2VEC2
    batch_settings = BatchSettings(
        geometry=WAV2VEC2, normalize=False, masks=None, hidden_size=1, num_layers=1, layerdrop=0.0
    )

    def __init__(self, labels, size):
        super().__init__()
        self.labels, self.size = labels, size
        self.most_logits_alive = self.num_calls = 0
        self.shapes = []

    def forward(self, waveforms, num_samples, is_padded):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.num_calls += 1
        self.shapes.append(tuple(waveforms.shape))
        frames = WAV2VEC2.num_frames(waveforms.shape[1])
        logits = torch.zeros(len(waveforms), frames, self.size)
        logits[:, :, 3] = 1  # babble
        for row, waveform in enumerate(waveforms):
            own = WAV2VEC2.num_frames(int(num_samples[row]))
            spelled = [label for each in self.labels[round(float(waveform[0]) * 32768)] for label in (each, 0)]
            assert len(spelled) <= own
            ids = torch.tensor(spelled + [0] * (own - len(spelled)))
            logits[row, :own] = nn.functional.one_hot(ids, self.size).float() * 2
        return logits


class MemorySet:
    """A set in memory: waveforms whose first sample is their number."""

    name = "memory"
    num_refused = 0

    def __init__(self, texts, lengths):
        self.texts = texts
        self.num_samples = np.array(lengths, dtype=np.int64)

    def __len__(self):
        return len(self.texts)

    def id(self, row):
        return str(row)

    def raw_text(self, row):
        return self.texts[row]

    def labels(self, row):
        return np.zeros(0, np.int32)

    def waveform(self, row):
        waveform = np.full(self.num_samples[row], 7, dtype=np.int16)
        waveform[0] = row
        return waveform


VOCABULARY = Vocabulary.build(["a bill to tell"])
TEXTS = ["a bill", "tell a bill to a bill", "to", "bill bill bill", "a", "tell tell", "to tell"]
LENGTHS = [24_000, 40_000, 9_000, 26_000, 5_000, 16_000, 16_000]


def score_oracle(world_size, unit_audio_s=4.0, equal_lengths=False):
    def run():
        oracle = Oracle([VOCABULARY.encode(text) for text in TEXTS], VOCABULARY.size).train()
        score = evaluate_set(
            oracle, MemorySet(TEXTS, LENGTHS), VOCABULARY, str.lower,
            unit_audio_s=unit_audio_s, equal_lengths=equal_lengths, accelerator=Accelerator(cpu=True), out=None,
        )  # fmt: skip
        return score, oracle.num_calls, oracle.shapes, oracle.training

    return run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("equal_lengths", [False, True])
def test_an_oracle_scores_0(world_size, equal_lengths):
    """Padding says babble here, so that a hypothesis which is not cut at its own frames would cost."""
    found = score_oracle(world_size, equal_lengths=equal_lengths)
    for score, _, _, training in found:
        assert score.wer == score.cer == score.wer_raw == 0
        assert score.words.num_reference == sum(len(text.split()) for text in TEXTS)
        assert score.num_rows == len(TEXTS)
        assert score.confusions == []
        assert training  # left as it came
    assert len({num_calls for _, num_calls, _, _ in found}) == 1  # a forward pass may be a collective
    shapes = [shape for _, _, seen, _ in found for shape in seen]
    assert max(rows for rows, _ in shapes) > 1
    if not equal_lengths:
        assert (2, 40_000) not in shapes  # 5 s
        assert any(rows * samples > 40_000 for rows, samples in shapes)


def test_batches_are_a_function_of_the_set_alone():
    def shapes(world_size):
        found = score_oracle(world_size)
        turns = max(len(seen) for _, _, seen, _ in found)
        return [found[rank][2][turn] for turn in range(turns) for rank in range(world_size)]

    alone = shapes(1)
    assert shapes(2)[: len(alone)] == alone
    assert shapes(3)[: len(alone)] == alone


@pytest.mark.parametrize("equal_lengths", [False, True])
def test_evaluation_units(equal_lengths):
    lengths = np.random.default_rng(0).integers(1, 60, 500).astype(np.int64) * 4000
    lengths[7] = 100 * RATE
    units = evaluation_units(lengths, 30.0, equal_lengths=equal_lengths)
    assert sorted(row for unit in units for row in unit.ids) == list(range(500))
    for unit in units:
        assert unit.padded_samples == lengths[unit.ids].max()
        assert len(unit.ids) == 1 or len(unit.ids) * unit.padded_samples <= 30 * RATE
        if equal_lengths:
            assert (lengths[unit.ids] == unit.padded_samples).all()
    assert all(first.padded_samples >= second.padded_samples for first, second in pairwise(units))
    padded = sum(len(unit.ids) * unit.padded_samples for unit in units)
    assert padded < 1.1 * lengths.sum()
    assert evaluation_units(np.zeros(0, np.int64), 30.0, equal_lengths=equal_lengths) == []


def test_logits_of_the_whole_set_are_never_held(monkeypatch):
    """Of 7 batches at most one batch's logits are alive at any time."""
    alive = most = 0

    class Watched(Oracle):
        def forward(self, waveforms, num_samples, is_padded):
            nonlocal alive, most
            logits = super().forward(waveforms, num_samples, is_padded)
            alive += 1
            most = max(most, alive)

            def gone():
                nonlocal alive
                alive -= 1

            weakref.finalize(logits, gone)
            return logits

    oracle = Watched([VOCABULARY.encode(text) for text in TEXTS], VOCABULARY.size)
    evaluate_set(
        oracle, MemorySet(TEXTS, LENGTHS), VOCABULARY, str, unit_audio_s=0.1, equal_lengths=False,
        accelerator=Accelerator(cpu=True), out=None,
    )  # fmt: skip
    assert oracle.num_calls == 7
    assert most == 1
    assert alive == 0


def test_a_line_of_metrics_jsonl(tmp_path):
    score = score_oracle(1)[0][0]
    line = json.loads(json.dumps(score.to_json()))
    assert {"wer", "cer", "wer_raw", "cer_raw", "num_rows", "num_refused", "words", "characters"} <= line.keys()
    assert line["words"]["hits"] == 17


def _rows(tmp_path):
    rows = [{"reference": "a b c", "hypothesis": "a x"}, {"reference": "d", "hypothesis": "d d"}]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_further_metrics_by_name_and_by_path(tmp_path):
    (tmp_path / "longest").mkdir()
    (tmp_path / "longest" / "longest.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Longest(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        text = datasets.Value('string')\n"
        "        features = datasets.Features({'predictions': text, 'references': text})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, *, predictions, references):\n"
        "        return {'longest': max(map(len, predictions))}\n"
    )
    score = score_oracle(1)[0][0]
    names = ["wer", str(tmp_path / "longest")]
    rows = _rows(tmp_path)

    def added():
        return add_metrics(score, names, rows, Accelerator(cpu=True), trust_remote_code=True)

    for found in run_ranks(2, added):
        assert found.metrics == {"wer": 3 / 4, "longest": 3.0}
        assert found.to_json()["longest"] == 3.0


def test_metrics_are_programs_and_need_trust(tmp_path):
    score = SimpleNamespace()
    with pytest.raises(RecipeError, match="trust_remote_code"):
        add_metrics(score, ["wer"], _rows(tmp_path), Accelerator(cpu=True), trust_remote_code=False)
    with pytest.raises(RecipeError, match=r"eval\.metrics: 'nowhere/none'"):
        add_metrics(score, ["nowhere/none"], _rows(tmp_path), Accelerator(cpu=True), trust_remote_code=True)
