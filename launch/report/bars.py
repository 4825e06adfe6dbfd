"""Hours as a bar, lives on a timeline, and the balance of ranks, as charts."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from asr_train.ledger import PARTS, name_of
from launch.report.charts import COLOURS, NOTHING, Chart, Table, bar_layout, base_layout, evenly, plain
from launch.report.lives import Life, run_ledger

_HOUR_S = 3600.0
# Colour and pattern of each part; together they tell all parts apart. The timeline uses the same ones.
_KEPT, _LOST, _QUEUED, _STARTING = (0, ""), (1, "/"), (7, "."), (6, "|")
_LOOKS: Final[dict[str, tuple[int, str]]] = {
    "compute": _KEPT, "padding": (0, "/"), "data_wait": (2, "x"), "peer_wait": (3, "-"), "checkpoint": (4, "\\"),
    "evaluation": (5, "+"), "startup": _STARTING, "other": (7, ""), "lost": _LOST, "queue": _QUEUED,
    "unaccounted": (7, "x"),
}  # fmt: skip
_MAX_LIVES = 40
_MAX_RANKS = 64  # in the table
_MAX_MARKS = 500  # of a kind, on the timeline


def ledger_chart(lives: Sequence[Life]) -> Chart | None:
    """One bar for the run, one for each life; their pieces add up to the wall time."""
    ledger = run_ledger(lives)
    spent_s, total_s = ledger.spent_s, sum(ledger.spent_s.values())
    if not total_s:
        return None
    unit, unit_s = _unit(total_s)
    spent = [life for life in lives if life.ledger.spent_s]
    shown = spent[-_MAX_LIVES:] if len(spent) > 1 else []
    rows = ["run", *(plain(life.name) for life in shown)]
    data = [
        {
            "type": "bar", "orientation": "h", "name": name_of(part), "y": rows,
            "x": [spent_s[part] / unit_s, *(life.ledger.spent_s.get(part, 0.0) / unit_s for life in shown)],
            "marker": _fill(_LOOKS[part]), "hovertemplate": f"{name_of(part)}: %{{x:.3g}} {unit}<extra></extra>",
        }
        for part in spent_s
    ]  # fmt: skip
    shares = ", ".join(f"{share:.1%} {name_of(part)}" for part, share in ledger.shares.items())
    table = Table(
        ("part", unit, "share", f"rank-{unit}"),
        [[name_of(part), f"{part_s / unit_s:.3f}", f"{part_s / total_s:.1%}", f"{ledger.rank_s[part] / unit_s:.3f}"]
         for part, part_s in spent_s.items()],
        totals=[["sum", f"{total_s / unit_s:.3f}", "100.0%", f"{sum(ledger.rank_s.values()) / unit_s:.3f}"],
           ["wall time, by the clock", f"{ledger.wall_s / unit_s:.3f}", f"{ledger.wall_s / total_s:.1%}", ""]],
    )  # fmt: skip
    return Chart(
        key="ledger", title="Ledger", table=table, data=data, height=110 + 34 * len(rows), is_open=True,
        alt=f"Ledger. {total_s / unit_s:.2f} {unit} in all: {shares}.",
        layout=bar_layout(unit, "", barmode="stack", showlegend=True, yaxis=_category_axis(rows)),
    )  # fmt: skip


def timeline_chart(lives: Sequence[Life]) -> Chart | None:
    """Queue, work that was kept, work that was lost; checkpoints, evaluations and troubles as marks."""
    shown = [life for life in lives if life.began is not None and life.ended is not None][-_MAX_LIVES:]
    if not shown:
        return None
    trained = [life for life in shown if life.attempt is not None]
    empty = [life for life in shown if life.attempt is None]
    data = [
        _spans("queue", shown, [(life.queued or life.began, life.began) for life in shown], _QUEUED),
        _spans("no training", empty, [(life.began, life.ended) for life in empty], _STARTING),
        _spans("kept", trained, [(life.began, _kept_until(life)) for life in trained], _KEPT),
        _spans("lost, made again", trained, [(_kept_until(life), life.ended) for life in trained], _LOST),
        _marks("checkpoint", shown, lambda line: line.get("event") == "saved", "diamond", 2),
        _marks("evaluation", shown, lambda line: "set" in line, "circle", 3),
        _marks(
            "trouble", shown, lambda line: line.get("event") in ("skipped", "save_failed"), "x", 5
        ),
    ]  # fmt: skip
    rows = [_timeline_row(life) for life in lives]
    lost = sum(life.num_lost_steps for life in lives)
    left_out = f" The newest {len(shown)} are drawn." if len(shown) < len(lives) else ""
    return Chart(
        key="timeline", title="Timeline", data=[trace for trace in data if trace["x"]],
        alt=f"Timeline of {len(lives)} starts. {lost:,} steps were lost and made again.{left_out}",
        layout=bar_layout(
            time.strftime("time of %Z", time.localtime(shown[0].began)), "", barmode="overlay", showlegend=True,
            xaxis={**base_layout()["xaxis"], "type": "date"},
            yaxis=_category_axis([plain(life.name) for life in shown]),
        ),
        height=110 + 34 * len(shown),
        note="Times of attempts that wrote nothing about their end reach to their last line." + left_out,
        table=Table(("start", "queued", "began", "ended", "checkpoints", "steps lost"), rows),
    )  # fmt: skip


def balance_chart(life: Life) -> Chart | None:
    """What every rank's time went to, by the newest ledger line of an attempt."""
    ranks = life.ledger.ranks
    if not ranks:
        return None
    parts = [part for part in PARTS if any(rank[f"{part}_s"] for rank in ranks)]
    data = [
        {
            "type": "bar", "name": name_of(part), "x": [rank["rank"] for rank in ranks],
            "y": [rank[f"{part}_s"] for rank in ranks], "marker": _fill(_LOOKS[part]),
            "text": [plain(str(rank.get("host", ""))) for rank in ranks], "textposition": "none",
            "hovertemplate": "rank %{x} on %{text}: %{y:.1f} s " + name_of(part) + "<extra></extra>",
        }
        for part in parts
    ]  # fmt: skip
    slow = sorted(ranks, key=_slowness, reverse=True)
    header = ("rank", "host", "slower than the median", *(f"{name_of(part)}, s" for part in parts))
    chosen = evenly(slow, _MAX_RANKS)
    table = Table(
        header,
        [
            [rank["rank"], rank.get("host", ""), f"{rank['straggler']:+.1%}" if "straggler" in rank else NOTHING,
             *(f"{rank[f'{part}_s']:.1f}" for part in parts)]
            for rank in chosen
        ],
        f"{len(chosen)} of {len(ranks)} ranks, the slowest first." if len(chosen) < len(ranks) else "",
    )  # fmt: skip
    layout = bar_layout("rank", "seconds", barmode="stack", showlegend=True)
    layout["xaxis"] = {**layout["xaxis"], "type": "category" if len(ranks) <= 16 else "-"}
    said = _slowest(slow)
    return Chart(
        key="balance", title=f"Ranks of {life.name}", data=data, layout=layout, table=table, note=said,
        alt=f"Balance of {len(ranks)} ranks in {life.name}. {said}",
    )  # fmt: skip


def _slowness(rank: Mapping[str, Any]) -> tuple[float, float]:
    """By the ledger's straggler score; without one, who waits least for the others is the one they wait for."""
    return rank.get("straggler", 0.0), -rank.get("peer_wait_s", 0.0)


def _slowest(slow: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the rank that the others wait for."""
    if len(slow) == 1:
        return "One rank has nobody to wait for."
    first, last = slow[0], slow[-1]
    score = first.get("straggler")
    much = "" if score is None else f", which takes {score:.1%} longer than the median rank for the same work"
    return (
        f"The slowest is rank {first['rank']} on {first.get('host')}{much}: it waited"
        f" {first.get('peer_wait_s', 0.0):.1f} s for others, rank {last['rank']} {last.get('peer_wait_s', 0.0):.1f} s."
    )


def clock(when: float | None) -> str:
    """A time for people, in this machine's zone."""
    return "" if when is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _unit(total_s: float) -> tuple[str, float]:
    return ("hours", _HOUR_S) if total_s >= 2 * _HOUR_S else ("minutes", 60.0)


def _fill(look: tuple[int, str]) -> dict[str, Any]:
    """Colour and pattern of a piece."""
    colour, shape = look
    pattern = {"shape": shape, "size": 7, "solidity": 0.35, "fgcolor": "#ffffff", "fillmode": "overlay"}
    line = {"width": 1, "color": "#ffffff"}
    return {"color": COLOURS[colour], "pattern": pattern if shape else {}, "line": line}


def _category_axis(names: Sequence[str]) -> dict[str, Any]:
    """Names from top to bottom."""
    axis = {"autorange": "reversed", "type": "category", "categoryorder": "array", "categoryarray": list(names)}
    return {**base_layout()["yaxis"], **axis}


def _spans(
    name: str, lives: Sequence[Life], spans: Sequence[tuple[float | None, float | None]], look: tuple[int, str]
) -> dict[str, Any]:
    """Bars from one time to another; those of no length are left out."""
    drawn = [
        (life, start, end)
        for life, (start, end) in zip(lives, spans, strict=True)
        if start is not None and end is not None and end > start
    ]
    return {
        "type": "bar", "orientation": "h", "name": name, "y": [plain(life.name) for life, _, _ in drawn],
        "base": [clock(start) for _, start, _ in drawn], "x": [1000 * (end - start) for _, start, end in drawn],
        "marker": _fill(look),
        "text": [f"{plain(life.ending)}, {end - start:,.0f} s" for life, start, end in drawn], "textposition": "none",
        "hovertemplate": f"{name}: %{{text}}<extra>%{{y}}</extra>",
    }  # fmt: skip


def _marks(name: str, lives: Sequence[Life], wanted: Any, symbol: str, look: int) -> dict[str, Any]:
    found = [(life, line) for life in lives for line in life.lines if "time" in line and wanted(line)]
    found = evenly(found, _MAX_MARKS)
    return {
        "type": "scatter", "mode": "markers", "name": name, "y": [plain(life.name) for life, _ in found],
        "x": [clock(line["time"]) for _, line in found],
        "text": [f"step {line['step']:,}" for _, line in found],
        "marker": {"symbol": symbol, "size": 9, "color": COLOURS[look], "line": {"width": 1, "color": "#ffffff"}},
        "hovertemplate": f"{name}, %{{text}}<extra>%{{y}}</extra>",
    }  # fmt: skip


def _kept_until(life: Life) -> float | None:
    """When an attempt had made the step that the run went on from; its end, where nothing was lost."""
    if not life.num_lost_steps:
        return life.ended
    times = [line["time"] for line in life.lines if "time" in line and line["step"] <= life.kept_step]
    return max(times, default=life.began)


def _timeline_row(life: Life) -> list[Any]:
    saved = sum(line.get("event") == "saved" for line in life.lines)
    return [life.name, clock(life.queued), clock(life.began), clock(life.ended), saved, life.num_lost_steps]
