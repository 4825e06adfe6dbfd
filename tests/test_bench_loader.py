"""Every way from disk to batch gives every utterance, and ours the values of the guide's."""

import json
import sys

import numpy as np
import pytest
import torch
from test_benchmarks import check_committed, load, run

from asr_train.data.batch import input_values
from asr_train.data.demo import demo_rows
from asr_train.errors import CorpusError
from asr_train.geometry import SAMPLE_RATE


@pytest.fixture(scope="module")
def loader():
    return load("loader")


@pytest.fixture(scope="module")
def folder(loader, tmp_path_factory):
    """Eight utterances in every form."""
    path = tmp_path_factory.mktemp("loader")
    loader.write_all(path, None, 8)
    return path


def test_ours_and_the_guides_batches_hold_the_same_waveforms_and_labels(loader, folder):
    (of_guide,) = loader.guide(folder, None)()
    ((batch, values),) = loader.ours(folder, of_like_count=True)()
    assert torch.equal(values, input_values(batch))
    theirs = {}
    for row, labels in zip(of_guide["input_values"], of_guide["labels"], strict=True):
        theirs[tuple(labels[labels != -100].tolist())] = row
    texts = batch.labels.split(batch.num_labels.tolist())
    assert len(theirs) == len(texts) == 8
    for row, text, size in zip(values, texts, batch.num_samples.tolist(), strict=True):
        assert torch.allclose(row[:size], theirs[tuple(text.tolist())][:size], atol=1e-4)


@pytest.mark.parametrize("key", ["ours_flac", "guide_numpy", "decoding", "lhotse_wav", "lhotse_flac"])
def test_every_other_way_gives_every_utterance_once_too(loader, folder, key):
    if key.startswith("lhotse"):
        pytest.importorskip("lhotse")
    utterances, samples = loader.open_and_check(key, folder)
    spoken = [len(row.synthesise()) for row, _ in zip(demo_rows("train"), range(8), strict=False)]
    assert utterances == 8
    assert samples == pytest.approx(sum(spoken), rel=1e-3)


def test_a_side_that_loses_an_utterance_is_no_result(loader, folder, monkeypatch):
    side = loader.SIDES["ours"]
    lossy = loader.Side(side.name, side.what, side.batches, lambda found: (len(found[0].ids) - 1, 1.0))
    monkeypatch.setattr(loader, "SIDES", {"ours": lossy})
    with pytest.raises(CorpusError, match="7 utterances"):
        loader.measure(folder, 1, 0.0, 8, 8 * SAMPLE_RATE)


def test_the_smoke_run_measures_every_side_and_its_table_is_in_the_readme(loader, tmp_path):
    out = tmp_path / "loader.json"
    done = run("loader.py", "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["sides"]) == set(sys.modules["benchmark_loader"].SIDES)
    assert all(np.isfinite(side["audio_s_per_s"]["median"]) for side in result["sides"].values())
    assert list(tmp_path.iterdir()) == [out]
    check_committed("loader", result)
