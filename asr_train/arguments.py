"""Command lines of the verbs that run in a child process: read without torch, so that help and mistakes are quick."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from asr_train.captions import FORMATS
from asr_train.windows import OVERLAP_S, WINDOW_S

DATA_HELP: Final = (
    "a recipe (a file, or the name of a shipped one), whose eval sets are scored; a table of audio and texts (.jsonl,"
    " .csv, .tsv, .parquet, .arrow); or a folder of audio files with their texts"
)
_CHECKPOINT = "best|newest|PATH"


def new_parser() -> argparse.ArgumentParser:
    """Of `new`."""
    parser = _make("new", "Look at your data, and write a commented recipe for it.")
    parser.add_argument("name", metavar="NAME", help="name of the recipe, and of the file: NAME.yaml")
    parser.add_argument(
        "data", nargs="?", metavar="DATA",
        help="a folder, a table, or a data set on the hub as OWNER/NAME[:CONFIG]; the built-in demo if not given",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="MODEL", help="a pretrained model, or `scratch`; chosen by the data if not given"
    )
    parser.add_argument("--audio-column", metavar="COLUMN", help="of a table, where its name does not tell")
    parser.add_argument("--text-column", metavar="COLUMN", help="likewise")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, not to NAME.yaml")
    return parser


def prepare_parser() -> argparse.ArgumentParser:
    """Of `prepare`."""
    parser = _make("prepare", "Prepare the corpus of a recipe.")
    _add_recipe(parser)
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    """Of `evaluate`."""
    parser = _make("evaluate", "WER and CER of a run or a model, from summed edit counts.")
    parser.add_argument("target", type=Path, metavar="RUN|MODEL", help="a run directory, or a model folder")
    parser.add_argument("--data", help=f"{DATA_HELP}. A run's own recipe if not given")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="NAME", help="this set only; repeat")
    parser.add_argument("--checkpoint", default="best", metavar=_CHECKPOINT, help="of a run (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/SET.jsonl: every row, worst first")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Of `export`."""
    parser = _make("export", "Export a run's model as a folder that transformers loads.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the model folder; RUN/export if not given")
    parser.add_argument("--checkpoint", default="best", metavar=_CHECKPOINT, help="which weights (%(default)s)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload it too, to a repository such as me/my-model")
    return parser


def transcribe_parser() -> argparse.ArgumentParser:
    """Of `transcribe`."""
    parser = _make("transcribe", "Transcribe audio files of any format and length.")
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a model folder: RUN/export, or one saved by transformers"
    )
    parser.add_argument("inputs", type=Path, nargs="+", metavar="FILE|FOLDER", help="audio files, or folders of them")
    parser.add_argument("--format", choices=FORMATS, default="text", help="text, JSON lines with word times, subtitles")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a file for each input there, not to stdout")
    parser.add_argument(
        "--window-s", type=float, default=WINDOW_S, metavar="S", help="longer audio is cut into windows (%(default)s)"
    )
    parser.add_argument(
        "--overlap-s", type=float, default=OVERLAP_S, metavar="S", help="that windows share (%(default)s)"
    )
    return parser


PARSERS: Final[dict[str, Callable[[], argparse.ArgumentParser]]] = {
    "asr_train.new": new_parser,
    "asr_train.prepare": prepare_parser,
    "asr_train.evaluate": evaluate_parser,
    "asr_train.export": export_parser,
    "asr_train.transcribe": transcribe_parser,
}
"""Module of a verb -> its command line."""


def _make(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"wavefleet {verb}", description=description, allow_abbrev=False)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
