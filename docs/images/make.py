"""Renew the pictures of the report: `python docs/images/make.py RUN`, with a run that was evaluated.

The one that is shown is the demo's, in two processes, with `limits.max_time_s=100` at first and a rank killed later.

Needs what the browser tests need: Debian's chromium and chromium-driver, and the extra `dev`.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser import browser  # noqa: E402

from launch import cli  # noqa: E402

WIDTH, LIMIT_BYTES = 1040, 150_000
# Name -> the first and the last thing in the picture.
PICTURES = {
    "report.png": ("header", "#chart-lr .plot"),
    "report-utterances.png": ("#h-utterances", "#worst-1 > li:nth-child(3)"),
}


def main() -> int:
    """Make the report, open it, and take the pictures."""
    (run,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, browser() as window:
        page = Path(folder) / "report.html"
        if code := cli.main(["report", run, "--audio", "--worst", "10", "--out", str(page)]):
            return code
        window.resize(WIDTH, 900)
        window.open(page)
        for name, (first, last) in PICTURES.items():
            where = "return document.querySelector(arguments[0]).getBoundingClientRect()[arguments[1]] + window.scrollY"
            top, bottom = window.run(where, first, "top"), window.run(where, last, "bottom")
            path = Path(__file__).with_name(name)
            window.picture(path, clip=(0, max(0, top - 16), WIDTH, bottom - top + 24))
            size = path.stat().st_size
            print(
                f"{path.relative_to(ROOT)}: {size:,} bytes{'' if size <= LIMIT_BYTES else ', more than README bears'}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
