"""What a training measured over its steps, as charts: of one run, or of several laid over each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from launch.report.charts import Axes, Chart, Curve, Point, Table, kept_points, line_chart, smoothed, thin
from launch.report.reading import Record
from launch.report.rows import Rows
from launch.report.speech import Speech

_GIB = 2**30
_HISTOGRAM_BINS = 40


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A value of the training lines."""

    key: str
    title: str
    axes: Axes
    wording: str = ".4g"
    scale: float = 1.0
    note: str = ""


LOSS = Measure(
    key="loss", title="Loss", axes=Axes(y="CTC loss a label"),
    note="Mean over the utterances of a step of their CTC loss, divided by the number of their labels.",
)  # fmt: skip
MEASURES = (
    Measure(key="lr", title="Learning rate", axes=Axes(from_zero=True), wording=".3g"),
    Measure(
        key="grad_norm", title="Gradient norm", axes=Axes(log=True), wording=".3g", note="Before clipping; log scale."
    ),
    Measure(key="loss_scale", title="Loss scale", axes=Axes(log=True), note="GradScaler's, with fp16; log scale."),
    Measure(
        key="audio_s_per_s", title="Throughput", axes=Axes(y="audio-seconds a second", from_zero=True), wording=".1f",
        note="Seconds of speech trained on, without padding, in a second of wall time; over all ranks.",
    ),
    Measure(
        key="memory_bytes", title="Memory", axes=Axes(y="GiB", from_zero=True), wording=".2f", scale=1 / _GIB,
        note="Rank 0's peak since its attempt began: of its GPU, or of its process where there is none.",
    ),
)  # fmt: skip


def training_charts(record: Record) -> list[Chart]:
    """Loss, learning rate, gradient norm, loss scale, throughput, memory: those that the run recorded."""
    charts = [_loss_chart(record), *(_measure_chart(record, measure) for measure in MEASURES)]
    return [chart for chart in charts if chart is not None]


def score_charts(record: Record) -> list[Chart]:
    """WER and CER of every set over the steps."""
    charts = []
    for metric, title in (("wer", "Word error rate"), ("cer", "Character error rate")):
        curves = [
            Curve(name=name, points=_scores(record, name, metric), marks=True, look=number)
            for number, name in enumerate(record.set_names)
        ]
        charts.append(line_chart(metric, title, curves, _rate_axes(), wording=".2%"))
    return [chart for chart in charts if chart is not None]


def overlaid(records: Mapping[str, Record]) -> list[Chart]:
    """The same charts of several runs, a curve a run; and one of WER for each set that any of them scored."""
    charts = [_overlay(records, LOSS, lambda points: smoothed(points, _window(points)))]
    sets = dict.fromkeys(name for record in records.values() for name in record.set_names)
    for set_name in sets:
        curves = [
            Curve(name=name, points=_scores(record, set_name, "wer"), marks=True, look=number)
            for number, (name, record) in enumerate(records.items())
        ]
        title = f"Word error rate, {set_name}"
        charts.append(line_chart(f"wer-{set_name}", title, curves, _rate_axes(), wording=".2%"))
    charts += [_overlay(records, measure) for measure in MEASURES]
    return [chart for chart in charts if chart is not None]


def length_chart(speech: Speech) -> Chart | None:
    """How long the utterances of each set are."""
    lengths = {name: speech.durations_s(name) for name in speech.corpus.sets}
    longest_s = max((float(durations.max()) for durations in lengths.values() if len(durations)), default=0.0)
    if not longest_s:
        return None
    edges = np.linspace(0.0, longest_s, _HISTOGRAM_BINS + 1)
    middles = [round(float(middle), 2) for middle in (edges[:-1] + edges[1:]) / 2]
    curves = []
    for look, (name, durations) in enumerate(lengths.items()):
        shares = np.histogram(durations, edges)[0] / max(1, len(durations))
        points: list[Point] = [(middle, float(share)) for middle, share in zip(middles, shares, strict=True)]
        curves.append(Curve(name=name, points=points, look=look))
    axes = Axes(x="seconds", y="share of utterances", y_format=".1%", from_zero=True)
    return line_chart("lengths", "Lengths of utterances", curves, axes, wording=".1%")


def wer_by_length_chart(evaluations: Sequence[Rows]) -> Chart | None:
    """WER of short and of long utterances, for each set."""
    curves = [
        Curve(
            name=rows.set_name, marks=True, look=look,
            points=[((entry.from_s + entry.to_s) / 2, entry.wer) for entry in rows.bins],
        )
        for look, rows in enumerate(evaluations)
    ]  # fmt: skip
    axes = Axes(x="seconds", y="WER", y_format=".0%", from_zero=True)
    chart = line_chart("wer-by-length", "Word error rate by length", curves, axes, wording=".1%")
    cells = [
        [rows.set_name, f"{entry.from_s:g} to {entry.to_s:g} s", entry.num_rows, entry.num_reference,
         "" if entry.wer is None else f"{entry.wer:.2%}"]
        for rows in evaluations for entry in rows.bins
    ]  # fmt: skip
    header = ("set", "length", "utterances", "words", "WER")
    return chart and replace(chart, table=Table(header, cells))


def _loss_chart(record: Record) -> Chart | None:
    points = kept_points(record.training, "loss")
    window = _window(points)
    mean = Curve(name=f"mean of {window} lines", points=smoothed(points, window))
    curves = [Curve(name="each line", points=points, faint=window > 1), *([mean] if window > 1 else [])]
    return line_chart(LOSS.key, LOSS.title, curves, replace(LOSS.axes, breaks=_breaks(record)), note=LOSS.note)


def _measure_chart(record: Record, measure: Measure) -> Chart | None:
    curve = Curve(name="", points=_scaled(kept_points(record.training, measure.key), measure.scale))
    axes = replace(measure.axes, breaks=_breaks(record))
    return line_chart(measure.key, measure.title, [curve], axes, note=measure.note, wording=measure.wording)


def _overlay(
    records: Mapping[str, Record], measure: Measure, prepare: Callable[[list[Point]], list[Point]] = thin
) -> Chart | None:
    curves = []
    for look, (name, record) in enumerate(records.items()):
        points = _scaled(kept_points(record.training, measure.key), measure.scale)
        curves.append(Curve(name=name, points=prepare(points), look=look))
    return line_chart(measure.key, measure.title, curves, measure.axes, note=measure.note, wording=measure.wording)


def _scaled(points: Sequence[Point], scale: float) -> list[Point]:
    return [(step, None if value is None else value * scale) for step, value in points]


def _scores(record: Record, set_name: str, metric: str) -> list[Point]:
    return kept_points((line for line in record.evaluations if line["set"] == set_name), metric)


def _rate_axes() -> Axes:
    return Axes(y_format=".0%", from_zero=True)


def _breaks(record: Record) -> list[float]:
    """Steps at which an attempt went on from a checkpoint."""
    steps: set[Any] = {line["step"] for line in record.events("restored")}
    return sorted(steps)


def _window(points: Sequence[Point]) -> int:
    """Lines that a smoothed loss is the mean of: about a fiftieth of the run; of a short one each stands for itself."""
    return len(points) // 50 if len(points) >= 250 else 1
