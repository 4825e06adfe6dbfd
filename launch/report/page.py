"""One self-contained HTML file: templates filled in, the plotting library and the figures inside.

Everything that a run's files say goes through Jinja's autoescape, or as JSON through its `tojson`, which escapes `<`.
Should that ever fail, the page's content security policy still lets no script run but the two whose hashes it names,
and loads nothing from anywhere.
"""

import base64
import gzip
import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Final

import jinja2
from plotly.offline import get_plotlyjs

from asr_train import __version__
from launch.report.bars import clock
from launch.report.charts import NOTHING, Chart, Table

# 1,234   +3.2   9.16 % ± 0.71   5 h 12 min   13.4 MB
_NUMBER: Final = (
    NOTHING + r"|[-+]?[\d,.]+(e-?\d+)?(\s?%)?( ± [\d.]+)?|\d+[\d.,]*\u202f(s|B|[kMGT]B|(h|min) \d\d\u202f(min|s))"
)


def render(template: str, content: Mapping[str, Any]) -> str:
    """The page.

    Args:
        template: name of one of this package's templates.
        content: its variables; every `Chart` in them, in lists and dicts too, is drawn.
    """
    files = resources.files(__package__)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["number_columns"] = number_columns
    environment.filters |= {"percent": percent, "duration": duration, "size": size, "clock": clock, "number": number}
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    plotly = get_plotlyjs()
    return environment.get_template(template).render(
        **content,
        figures={chart.key: chart.figure() for chart in _charts(content)},
        script=script,
        style=files.joinpath("report.css").read_text(encoding="utf-8"),
        plotly=base64.b64encode(gzip.compress(plotly.encode("utf-8"), mtime=0)).decode("ascii"),
        policy=_policy(script, plotly),
        version=__version__,
    )


def percent(share: float | None, digits: int = 2) -> str:
    """0.0916 as `9.16 %`."""
    return NOTHING if share is None else f"{100 * share:.{digits}f}\u202f%"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `5 h 12 min`, `3 min 20 s`, `4.2 s`."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}\u202fh {minutes:02d}\u202fmin" if hours else f"{minutes}\u202fmin {rest:02d}\u202fs"


def size(num_bytes: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g}\u202f{unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g}\u202fTB"


def number(value: Any) -> str:
    """A number with separators; other values as they are, nothing for None."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def number_columns(table: Table) -> list[bool]:
    """Which columns of a table stand at the right: those that hold numbers, or nothing, and no other text."""
    columns = [[row[at] for row in table.rows if row[at] not in (None, "")] for at in range(len(table.header))]
    return [bool(cells) and all(map(_is_number, cells)) for cells in columns]


def _is_number(cell: Any) -> bool:
    """A number, or a text of one with its unit."""
    return not isinstance(cell, bool) and (
        isinstance(cell, (int, float)) or (isinstance(cell, str) and re.fullmatch(_NUMBER, cell) is not None)
    )


def _charts(content: Any) -> Iterator[Chart]:
    if isinstance(content, Chart):
        yield content
    elif isinstance(content, Mapping):
        for item in content.values():
            yield from _charts(item)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _charts(item)


def _policy(*scripts: str) -> str:
    """Run these scripts and no other; show what is inside the page; fetch nothing."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii") for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; media-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
