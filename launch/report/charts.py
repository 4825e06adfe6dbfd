"""Charts as plotly figures in plain JSON, each with a sentence that says what it shows and a table of its numbers.

Colours of text and grid are left to the page's style sheet, which knows dark mode and print. Traces differ by dash,
marker or pattern too, not by colour alone. What a user named (runs, hosts, sets) is escaped: plotly reads some HTML.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# Three to one at least against white and against the dark page, as WCAG 2.2 asks of graphics (1.4.11).
COLOURS: Final = ("#2f7ed8", "#d1571a", "#2c9154", "#a259c4", "#b5770d", "#d6458b", "#1593a5", "#7d8a97")
_DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
NOTHING: Final = "\u2013"  # in a cell, where there is no value
MAX_POINTS: Final = 1500  # of a curve; a screen has no more columns
_MAX_TABLE_ROWS: Final = 40

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Table:
    """Numbers behind a chart; a cell is a number or a text."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    totals: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure for plotly, and what stands for it where it cannot be seen.

    Attributes:
        key: its id on the page.
        alt: what it shows, in a sentence.
        note: shown under it.
        is_open: its table is shown from the start, and printed.
    """

    key: str
    title: str
    alt: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    table: Table
    note: str = ""
    height: int = 300
    is_open: bool = False

    def figure(self) -> dict[str, Any]:
        """What plotly takes."""
        return {"data": list(self.data), "layout": {**base_layout(), "height": self.height, **self.layout}}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart: (step, value) in the order of steps; None breaks the line."""

    name: str
    points: Sequence[Point]
    marks: bool = False  # every point is shown, for there are few
    look: int = 0  # which colour and dash
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What a chart of curves is about."""

    x: str = "step"
    y: str = ""
    y_format: str = ""  # d3's: ".0%"
    log: bool = False
    from_zero: bool = False
    breaks: Sequence[float] = field(default=())  # steps at which an attempt went on, drawn as dotted lines


def base_layout() -> dict[str, Any]:
    """What all charts share. A drag selects nothing: on a phone it scrolls the page."""
    axis = {"automargin": True, "zeroline": False, "showline": True}
    return {
        "autosize": True,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "colorway": list(COLOURS),
        "hovermode": "x unified",
        "dragmode": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def line_chart(
    key: str, title: str, curves: Sequence[Curve], axes: Axes, *, note: str = "", wording: str = ".4g"
) -> Chart | None:
    """A chart of curves over steps; None when there is no point to draw.

    Args:
        key: see `Chart`.
        title: see `Chart`.
        note: see `Chart`.
        curves: those without a point are left out.
        axes: names and scales.
        wording: format of numbers in the sentence and the table.
    """
    curves = [curve for curve in curves if any(value is not None for _, value in curve.points)]
    if not curves:
        return None
    steps = {step for curve in curves for step, _ in curve.points}
    layout = {
        "xaxis": {
            **base_layout()["xaxis"],
            "title": {"text": axes.x},
            "tickformat": ",d" if axes.x == "step" else "",
            **({"tickvals": list(steps)} if len(steps) == 1 else {}),
        },
        "yaxis": {
            **base_layout()["yaxis"],
            "title": {"text": axes.y},
            "tickformat": axes.y_format,
            **({"type": "log", "tickvals": _log_ticks(curves)} if axes.log else {}),
            "rangemode": "tozero" if axes.from_zero else "normal",
        },
        "showlegend": len(curves) > 1,
        "shapes": [
            {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "opacity": 0.6,
             "line": {"dash": "dot", "width": 1, "color": COLOURS[7]}}
            for step in axes.breaks
        ],
    }  # fmt: skip
    shown = [curve for curve in curves if not curve.faint] or curves
    sentence = " ".join(_sentence(curve, axes, wording, is_only=len(shown) == 1) for curve in shown)
    return Chart(
        key=key, title=title, alt=f"{title}. {sentence}", layout=layout, note=note,
        data=[_line(curve, axes, wording) for curve in curves], table=_table(shown, axes, wording, title),
    )  # fmt: skip


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points of a curve: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = [point for point in points[start : start + size] if point[1] is not None]
        if stretch:
            ends = {min(stretch, key=lambda point: point[1] or 0.0), max(stretch, key=lambda point: point[1] or 0.0)}
            kept += sorted(ends)
    return kept


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of each `window` points up to and with each one; points without a value are left out."""
    values = [(step, value) for step, value in points if value is not None]
    found: list[Point] = []
    total = 0.0
    for position, (step, value) in enumerate(values):
        total += value
        if position >= window:
            total -= values[position - window][1]
        found.append((step, total / min(window, position + 1)))
    return found


def plain(text: str) -> str:
    """A text that plotly shows as it is."""
    return html.escape(text, quote=False)


def bar_layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Axes of a bar chart."""
    layout = base_layout()
    return {
        "xaxis": {**layout["xaxis"], "title": {"text": x}},
        "yaxis": {**layout["yaxis"], "title": {"text": y}},
        "hovermode": "closest",
        "showlegend": False,
        "bargap": 0.15,
        **more,
    }


def _line(curve: Curve, axes: Axes, wording: str) -> dict[str, Any]:
    points = thin(curve.points)
    colour = COLOURS[curve.look % len(COLOURS)]
    hover = axes.y_format or wording
    return {
        "type": "scatter",
        "name": plain(curve.name),
        "x": [step for step, _ in points],
        "y": [value if value is None or math.isfinite(value) else None for _, value in points],
        "mode": "lines+markers" if curve.marks or len(points) == 1 else "lines",
        "line": {"color": colour, "dash": _DASHES[curve.look % len(_DASHES)], "width": 1 if curve.faint else 2},
        "marker": {"symbol": _SYMBOLS[curve.look % len(_SYMBOLS)], "size": 7, "color": colour},
        "opacity": 0.45 if curve.faint else 1.0,
        "yhoverformat": hover.replace(".0%", ".2%"),
    }


def _log_ticks(curves: Sequence[Curve]) -> list[float]:
    """1, 2, 5, 10, ... as far as the curves go, or powers of ten, where they go far; plotly writes 0.5 as 5 there."""
    values = [value for curve in curves for _, value in curve.points if value is not None and value > 0]
    if not values:
        return []
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    return [digit * 10.0**decade for decade in decades for digit in ((1, 2, 5) if len(decades) <= 4 else (1,))]


def _sentence(curve: Curve, axes: Axes, wording: str, *, is_only: bool) -> str:
    points = [(step, value) for step, value in curve.points if value is not None]
    low, high = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    who = "" if is_only else f"{curve.name}: "
    first, last = points[0], points[-1]
    if first == last:
        return f"{who}{format(last[1], wording)} at {axes.x} {last[0]:,}."
    return (
        f"{who}from {format(first[1], wording)} at {axes.x} {first[0]:,} to {format(last[1], wording)} at"
        f" {last[0]:,}; lowest {format(low[1], wording)} at {low[0]:,}, highest {format(high[1], wording)} at"
        f" {high[0]:,}."
    )


def _table(curves: Sequence[Curve], axes: Axes, wording: str, title: str) -> Table:
    """Every point where they are few, else evenly chosen ones."""
    columns = [dict(curve.points) for curve in curves]
    steps = sorted({step for column in columns for step in column})
    chosen = evenly(steps, _MAX_TABLE_ROWS)
    rows = [[step, *(_cell(column.get(step), wording) for column in columns)] for step in chosen]
    note = f"{len(chosen)} of {len(steps):,} points; metrics.jsonl has them all." if len(chosen) < len(steps) else ""
    return Table([axes.x, *(curve.name or title for curve in curves)], rows, note)


def evenly(values: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the values, evenly spaced, first and last among them."""
    if len(values) <= limit:
        return list(values)
    return [values[round(number * (len(values) - 1) / (limit - 1))] for number in range(limit)]


def _cell(value: float | None, wording: str) -> str:
    return "" if value is None else format(value, wording)


def kept_points(lines: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of the lines that have a key; null, for what is not finite, stays None."""
    return [(line["step"], line[key]) for line in lines if key in line]
