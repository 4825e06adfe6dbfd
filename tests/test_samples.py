"""A few utterances of a corpus as files."""

import pytest
import soundfile

from asr_train import samples
from asr_train.errors import CorpusError, RecipeError


def test_samples_are_the_corpus_own_waveforms_spread_over_the_set(tiny_corpus, tmp_path):
    dev = tiny_corpus.sets["dev"]
    written = samples.write_samples(tiny_corpus, "dev", tmp_path, 3)
    rows = [0, (len(dev) - 1) // 2, len(dev) - 1]
    assert list(written.values()) == [dev.text(row) for row in rows]
    for path, row in zip(written, rows, strict=True):
        waveform, rate = soundfile.read(path, dtype="int16")
        assert rate == 16_000
        assert (waveform == dev.waveform(row)).all()


def test_more_than_there_are_gives_all(tiny_corpus, tmp_path):
    assert len(samples.write_samples(tiny_corpus, "dev", tmp_path, 99)) == len(tiny_corpus.sets["dev"])


def test_the_command_prints_files_and_references_or_says_what_is_missing(
    tiny_corpus, tiny_recipe_file, tmp_path, capsys
):
    recipe = str(tiny_recipe_file())
    assert samples.main([recipe, "--set", "dev", "--count", "1", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'dev-1.wav'}\t{tiny_corpus.sets['dev'].text(0)}\n"
    with pytest.raises(RecipeError, match=r"no set 'nothing' .* known: train, dev"):
        samples.main([recipe, "--set", "nothing", "--out", str(tmp_path)])
    with pytest.raises(CorpusError, match="not there yet: wavefleet prepare"):
        samples.main([recipe, "data.corpus_root=elsewhere", "--set", "dev", "--out", str(tmp_path)])
