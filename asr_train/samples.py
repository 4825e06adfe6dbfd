"""A few utterances of a prepared corpus as WAV files, to listen to and to transcribe."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from asr_train.data.corpus import Corpus
from asr_train.errors import EXIT_DONE, CorpusError, RecipeError, run_main
from asr_train.geometry import SAMPLE_RATE
from asr_train.prepare import is_prepared
from asr_train.recipe import load_recipe


def write_samples(corpus: Corpus, set_name: str, out: Path, count: int) -> dict[Path, str]:
    """Write `count` utterances, spread evenly over a set, as 16 kHz WAV files; file -> its reference text."""
    chosen = corpus.sets[set_name]
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for number, row in enumerate(np.linspace(0, len(chosen) - 1, min(count, len(chosen)), dtype=int), start=1):
        path = out / f"{set_name}-{number}.wav"
        soundfile.write(path, chosen.waveform(int(row)), SAMPLE_RATE, subtype="PCM_16")
        written[path] = chosen.text(int(row))
    return written


def main(argv: Sequence[str]) -> int:
    """Command line: writes the files and prints their reference texts."""
    parser = argparse.ArgumentParser(prog="python -m asr_train.samples", description=__doc__)
    parser.add_argument("recipe", help="a recipe whose corpus is prepared")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--set", required=True, metavar="NAME", help="`train`, or a set of eval.sets")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--count", type=int, default=5, help="how many (%(default)s)")
    options = parser.parse_intermixed_args(argv)
    path = is_prepared(load_recipe(options.recipe, options.overrides))
    if path is None:
        raise CorpusError(f"the corpus of {options.recipe} is not there yet: wavefleet prepare {options.recipe}")
    corpus = Corpus.open(path)
    if options.set not in corpus.sets:
        raise RecipeError(f"no set {options.set!r} in {path}; known: {', '.join(corpus.sets)}")
    for file, text in write_samples(corpus, options.set, options.out, options.count).items():
        print(f"{file}\t{text}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
