"""`wavefleet report RUN`: what a run did, as one HTML file that opens offline; several runs are compared."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from asr_train.errors import EXIT_DONE, RecipeError
from asr_train.files import write_text
from launch.report.comparison import comparison_page
from launch.report.page import size
from launch.report.reading import read_record
from launch.report.run_page import Wishes, run_page
from launch.runs import open_run

_AUDIO_MB = 10.0
_MB = 1_000_000


def main(argv: Sequence[str]) -> int:
    """Write the report, and say where it is."""
    options = _parser().parse_args(argv)
    runs = list(dict.fromkeys(open_run(name) for name in options.runs))
    if len(runs) > 1 and options.audio is not None:
        raise RecipeError("--audio: a comparison shows no utterances; make a report of one run")
    records = [read_record(run) for run in runs]
    if len(records) == 1:
        wishes = Wishes(num_worst=options.worst, audio_bytes=round((options.audio or 0.0) * _MB))
        page, path = run_page(records[0], wishes), options.out or runs[0].path / "report.html"
    else:
        page, path = comparison_page(records), options.out or Path("report.html")
    write_text(path, page)
    print(f"{path} ({size(path.stat().st_size)})")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet report", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run directory, or its name in runs/; several are compared"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (RUN/report.html; ./report.html for a comparison)"
    )
    parser.add_argument(
        "--worst", type=_count, default=50, metavar="N", help="utterances of each set that are shown (%(default)s)"
    )
    parser.add_argument(
        "--audio", type=_megabytes, nargs="?", const=_AUDIO_MB, metavar="MB",
        help=f"put their recordings into the page, worst first, up to so many MB (without a number {_AUDIO_MB:g})",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value
