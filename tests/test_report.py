"""`wavefleet report`: what it reads from a run's files, and its figures. The page in a browser: test_report_page."""

import base64
import io
import json
import re
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import soundfile
from rich_run import MAX_STEPS, write_rich_run

from asr_train.data.corpus import Corpus
from asr_train.files import append_jsonl
from asr_train.run_dir import RunDir
from launch import cli
from launch.report import charts, rows
from launch.report.bars import balance_chart, ledger_chart, timeline_chart
from launch.report.charts import Table
from launch.report.curves import length_chart, overlaid, score_charts, training_charts, wer_by_length_chart
from launch.report.lives import read_lives
from launch.report.page import duration, number_columns, percent
from launch.report.reading import read_record
from launch.report.rows import difference, half_width, read_rows
from launch.report.run_page import newest_rows
from launch.report.speech import open_speech

HEARD = ["one two tree", "one to tree", "two tree", "one two tree a", "", "won too three"]


@pytest.fixture(scope="module")
def pairs(tiny_corpus):
    """Id -> (reference, hypothesis) of the tiny corpus' evaluation set."""
    dev = tiny_corpus.sets["dev"]
    return {dev.id(row): ("one two tree", HEARD[row % len(HEARD)]) for row in range(len(dev))}


@pytest.fixture(scope="module")
def made(tiny_recipe, tiny_corpus, pairs, tmp_path_factory):
    """A rich run, and what the report should say of it."""
    path = tmp_path_factory.mktemp("report") / "rich"
    return RunDir(path), write_rich_run(path, tiny_recipe(), tiny_corpus, pairs=pairs)


@pytest.fixture
def run(made, tmp_path):
    """A copy of the rich run, to be damaged."""
    shutil.copytree(made[0].path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def report(capsys, *arguments):
    """Exit code, the page, and what was said on stderr."""
    code = cli.main(["report", *map(str, arguments)])
    said = capsys.readouterr()
    path = said.out.partition(" (")[0]
    return code, Path(path).read_text(encoding="utf-8") if path else "", said.err


def lives_of(run):
    return read_lives(run, read_record(run).lines)


def without_scripts(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


# --- lives ------------------------------------------------------------------------------------------------------


def test_every_start_stands_in_its_order_with_its_end_and_what_was_lost(made):
    run, truth = made
    lives = lives_of(run)
    assert [(life.start, life.attempt, life.ending) for life in lives] == [
        ("7.0", 1, "node_failure"), ("7.1", None, "preflight"), ("7.2", 2, "preempted"),
        ("8.0", 3, "out_of_memory"), ("9.0", 4, "done"),
    ]  # fmt: skip
    assert [(life.first_step, life.last_step) for life in lives if life.attempt] == [
        (0, 34),
        (30, 47),
        (47, 55),
        (50, 60),
    ]
    assert {life.attempt: life.num_lost_steps for life in lives if life.attempt} == truth.lost_steps
    assert truth.lost_steps == {1: 4, 2: 0, 3: 5, 4: 0}
    assert [round(life.queue_s) for life in lives] == [30, 15, 30, 40, 25]


def test_without_a_verdict_the_first_rank_that_failed_by_itself_is_named(run):
    (run.path / "verdicts.jsonl").unlink()
    lives = {life.attempt: life for life in lives_of(run)}
    assert (lives[3].ending, lives[3].message) == ("failed", "rank 2 on n2: out of memory")
    assert lives[2].ending == "stopped"
    assert lives[1].ending == "unknown" and "wrote nothing" in lives[1].message


def test_a_run_that_is_not_over_has_lost_nothing_that_may_still_be_saved(run):
    run.done.unlink()
    assert lives_of(run)[-1].num_lost_steps == 0  # step 60 is a checkpoint
    append_jsonl(run.metrics, {"attempt": 4, "step": 64, "loss": 0.1, "time": 1_790_001_000.0})
    assert lives_of(run)[-1].num_lost_steps == 4
    with run.lock():
        alive = lives_of(run)[-1]
    assert alive.num_lost_steps == 4, "its verdict says that it ended"
    (run.path / "verdicts.jsonl").unlink()
    shutil.rmtree(run.path / "outcome" / "attempt-004")
    with run.lock():
        alive = lives_of(run)[-1]
    assert (alive.ending, alive.num_lost_steps) == ("running", 0)


# --- where the time went ----------------------------------------------------------------------------------------


def test_the_rank_that_the_others_wait_for_is_named_with_its_host(made):
    lives = lives_of(made[0])
    chart = balance_chart(lives[-1])
    assert "The slowest is rank 3 on n2, which takes 40.0% longer" in chart.alt
    assert chart.table.rows[0][:3] == [3, "n2", "+40.0%"]
    assert balance_chart(lives[1]) is None


# --- rows of an evaluation --------------------------------------------------------------------------------------


def test_the_interval_of_the_wer_is_what_drawing_other_utterances_gives():
    generator = np.random.default_rng(0)
    words = generator.integers(3, 20, 400)
    wrong = generator.binomial(words, generator.beta(1, 8, 400))
    drawn = generator.integers(0, 400, (4000, 400))
    rates = wrong[drawn].sum(axis=1) / words[drawn].sum(axis=1)
    expected = (np.quantile(rates, 0.975) - np.quantile(rates, 0.025)) / 2
    assert half_width(zip(wrong.tolist(), words.tolist(), strict=True)) == pytest.approx(expected, rel=0.05)


def test_two_models_are_compared_utterance_by_utterance():
    first = {f"u{i}": (i % 5, 10) for i in range(200)}
    better = {name: (max(0, wrong - (i % 2)), words) for i, (name, (wrong, words)) in enumerate(first.items())}
    change, width = difference(first, better)
    expected = sum(better[name][0] - first[name][0] for name in first) / 2000
    assert change == pytest.approx(expected) and change < 0
    assert width < half_width(first.values()), "what is hard for both is no part of the difference"
    assert difference(first, {**better, "u0": (0, 11)}) is None, "another reference"
    assert difference(first, dict(list(better.items())[1:])) is None, "not the same utterances"


def test_rows_are_counted_by_length_and_the_worst_come_first(made, pairs):
    found = read_rows(made[0], "dev", 60, num_worst=3)
    assert found.num_rows == len(pairs) == sum(entry.num_rows for entry in found.bins)
    # of twelve rows two each: right; 1 S; 1 D; 1 I; 3 D; 3 S
    assert sum(entry.num_errors for entry in found.bins) == 2 * (0 + 1 + 1 + 1 + 3 + 3)
    assert sum(entry.num_reference for entry in found.bins) == 3 * len(pairs)
    assert [row["wer"] for row in found.worst] == [1.0, 1.0, 1.0]
    assert ("two", "to", 2) in found.confusions and ("one", None, 4) in found.confusions
    assert read_rows(made[0], "dev", 59, num_worst=3) is None


def test_the_edges_of_lengths_are_round_and_hold_every_utterance():
    durations = [0.0, 0.1, 4.9, 5.0, 99.0, 100.0]
    found = rows._bins(durations, [(1, 2)] * 6)
    assert sum(entry.num_rows for entry in found) == 6
    assert {entry.to_s - entry.from_s for entry in found} == {10.0}
    assert found[-1].to_s >= 100.0


# --- charts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_charts(made):
    record = read_record(made[0])
    lives = lives_of(made[0])
    evaluations = newest_rows(record, 5)
    return [
        *training_charts(record), *score_charts(record), wer_by_length_chart(evaluations),
        length_chart(open_speech(record)[0]), ledger_chart(lives), timeline_chart(lives),
        balance_chart(lives[-1]), *overlaid({"one": record, "other": record}),
    ]  # fmt: skip


def test_there_is_a_chart_of_everything_that_was_recorded(all_charts):
    assert {chart.key for chart in all_charts} == {
        "loss", "lr", "grad_norm", "loss_scale", "audio_s_per_s", "memory_bytes", "wer", "cer", "wer-by-length",
        "lengths", "ledger", "timeline", "balance", "wer-dev", "wer-noisy",
    }  # fmt: skip


def test_plotly_knows_every_property_that_the_charts_use(all_charts):
    for chart in all_charts:
        go.Figure(chart.figure())  # raises ValueError on the first one that it does not know


def test_every_chart_says_what_it_shows_and_has_its_numbers_beside_it(all_charts):
    for chart in all_charts:
        assert len(chart.alt) > len(chart.title) + 20, chart.key
        assert chart.table.rows and all(len(row) == len(chart.table.header) for row in chart.table.rows), chart.key


def test_curves_leave_out_what_was_lost(made):
    record = read_record(made[0])
    assert [line["step"] for line in record.training] == list(range(1, MAX_STEPS + 1))
    attempts = {line["step"]: line["attempt"] for line in record.training}
    assert (attempts[30], attempts[31], attempts[50], attempts[51]) == (1, 2, 3, 4)


def test_a_long_curve_keeps_its_spikes_and_its_order():
    points = [
        (step, 1.0 + (100.0 if step == 54_321 else 0.0) - (0.5 if step == 777 else 0.0)) for step in range(100_000)
    ]
    kept = charts.thin(points)
    assert len(kept) <= charts.MAX_POINTS + 2
    assert {(54_321, 101.0), (777, 0.5)} <= set(kept)
    assert kept == sorted(kept)


def test_a_loss_that_was_no_number_breaks_the_curve_and_nothing_else(run):
    append_jsonl(run.metrics, {"attempt": 4, "step": 61, "loss": None, "grad_norm": float("nan"), "time": 1.0})
    chart = training_charts(read_record(run))[0]
    assert chart.data[0]["y"][-1] is None and chart.data[0]["x"][-1] == 61
    go.Figure(chart.figure())


def luminance(colour):
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def themes():
    """The style sheet's colours by name: light, dark."""
    style = resources.files("launch.report").joinpath("report.css").read_text(encoding="utf-8")
    found = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_and_lines_can_be_told_from_the_page(theme):
    for ink, page in [("ink", "page"), ("soft", "page"), ("link", "page"), ("ink", "card"), ("soft", "card"),
                      ("ink", "warn-page"), ("sub", "sub-page"), ("del", "del-page"), ("ins", "ins-page")]:  # fmt: skip
        assert contrast(theme[ink], theme[page]) >= 4.5, (ink, page)
    for colour in charts.COLOURS:
        assert contrast(colour, theme["page"]) >= 3.0, colour


# --- the verb ---------------------------------------------------------------------------------------------------


def test_a_page_is_written_into_the_run_and_its_place_is_said(run, capsys):
    code, page, _ = report(capsys, run.path)
    assert code == 0 and (run.path / "report.html").exists()
    text = without_scripts(page)
    for said in ("Done after 60 steps", "a GPU is missing", "n2 was lost", "NVIDIA H200", "94,000,000", "attempt 4"):
        assert said in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text), "nothing outside the page is named"


def test_a_line_that_a_kill_tore_is_left_out_and_said(run, capsys):
    with run.metrics.open("a") as stream:
        stream.write('{"attempt": 4, "step": 61, "lo')
    code, page, _ = report(capsys, run.path)
    assert code == 0 and "1 line of metrics.jsonl cannot be read and is left out" in page
    assert "60 of 60" in page


def test_a_run_that_was_never_started_has_nothing_to_report(run, capsys):
    run.metrics.unlink()
    shutil.rmtree(run.path / "attempts")
    code, page, said = report(capsys, run.path)
    assert code == 2 and not page and "has not been started yet" in said
    assert not (run.path / "report.html").exists()


def test_a_run_that_failed_before_its_first_step_shows_how(run, capsys):
    run.metrics.unlink()
    run.done.unlink()
    code, page, _ = report(capsys, run.path)
    text = without_scripts(page)
    assert code == 0 and "No training line has been written yet" in text and "a GPU is missing" in text
    assert 'data-chart="loss"' not in text


def test_no_run_there_is_a_mistake_in_the_command(tmp_path, capsys):
    assert report(capsys, tmp_path / "nowhere")[0] == 2


def test_a_run_of_an_older_version_is_shown_with_what_it_has(run, capsys):
    """Its lines lack fields of today, its attempts their start, and its recipe holds a field that is gone."""
    kept = ("attempt", "event", "step", "epoch", "loss", "grad_norm", "lr", "set", "wer", "cer", "time", "max_steps")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines = [
        {key: value for key, value in line.items() if key in kept} for line in lines if line.get("event") != "ledger"
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (run.path / "attempts").glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: record[key] for key in ("attempt", "started", "host", "world_size")}))
    shutil.rmtree(run.path / "agents")
    (run.path / "verdicts.jsonl").unlink()
    recipe = run.path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "a_field_that_is_gone: 7\n")
    code, page, _ = report(capsys, run.path)
    text = without_scripts(page)
    assert code == 0 and "this version cannot check it" in text and "a_field_that_is_gone" in text
    assert 'data-chart="loss"' in text and 'data-chart="wer"' in text and 'data-chart="balance"' not in text
    assert "does not name its corpus" in text or "do not name its corpus" in text


def test_recordings_are_what_the_model_heard_worst_first_up_to_a_limit(run, tiny_corpus, capsys):
    _, page, _ = report(capsys, run.path, "--audio")
    found = re.findall(r'aria-label="Recording of ([\w-]+)" src="data:audio/flac;base64,([^"]+)"', page)
    assert len(found) == 10, "of the twelve utterances two were recognised"
    dev = tiny_corpus.sets["dev"]
    ids = [dev.id(row) for row in range(len(dev))]
    for name, encoded in found:
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)), dtype="int16")
        assert rate == 16_000
        np.testing.assert_array_equal(samples, dev.waveform(ids.index(name)))
    whole = sum(len(encoded) for _, encoded in found) / 1e6
    _, page, _ = report(capsys, run.path, "--audio", f"{whole / 2:.4f}")
    fewer = re.findall(r'aria-label="Recording of ([\w-]+)"', page)
    assert 0 < len(fewer) < 10 and fewer[0] == found[0][0] and "more are left out" in page
    _, page, _ = report(capsys, run.path)
    assert "<audio" not in page and "make the report with --audio" in page


def test_recordings_that_are_gone_are_missed_aloud(run, capsys):
    recipe = run.path / "recipe.yaml"
    recipe.write_text(re.sub(r"corpus_root: .*", "corpus_root: /nowhere", recipe.read_text()))
    code, page, said = report(capsys, run.path, "--audio")
    assert code == 0 and "no longer in /nowhere" in page and "no recordings" in said


@pytest.mark.parametrize("arguments", [["--audio", "0"], ["--audio", "much"], ["--worst", "-1"], ["--worst", "x"]])
def test_sizes_that_are_none_are_refused(run, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run.path), *arguments])
    assert ended.value.code == 2


def test_refused_rows_are_counted_by_their_reason(run, tiny_corpus, tmp_path, capsys):
    root = tmp_path / "corpora"
    copy = root / tiny_corpus.path.name
    shutil.copytree(tiny_corpus.path, copy)
    info = json.loads((copy / "corpus.json").read_text())
    info["sets"]["train"]["rejected"] = {"silence": 7, "too long": 2}
    info["sets"]["train"]["examples"] = {"silence": "a-17: -80 dB", "too long": "b-4: 31.2 s"}
    (copy / "corpus.json").write_text(json.dumps(info))
    assert Corpus.open(copy).hash == tiny_corpus.hash
    recipe = run.path / "recipe.yaml"
    recipe.write_text(re.sub(r"corpus_root: .*", f"corpus_root: {root}", recipe.read_text()))
    _, page, _ = report(capsys, run.path)
    text = re.sub(r"<[^>]*>", " ", without_scripts(page))
    assert re.search(r"silence\s+train\s+7\s+a-17: -80 dB", text) and re.search(r"too long\s+train\s+2\s+b-4", text)


# --- comparison -------------------------------------------------------------------------------------------------


def test_a_comparison_names_what_differs_and_nothing_else(made, tiny_recipe, tiny_corpus, pairs, tmp_path, capsys):
    other = tmp_path / "other"
    changed = tiny_recipe(**{"optim.lr": 7e-4, "name": "other", "log.every": 3})
    worse = {name: (reference, "nothing") for name, (reference, _) in pairs.items()}
    write_rich_run(other, changed, tiny_corpus, pairs=worse, lowest_wer=0.1)
    code, page, _ = report(capsys, made[0].path, other, "--out", tmp_path / "both.html")
    assert code == 0
    text = re.sub(r"<[^>]*>", " ", without_scripts(page))
    fields = re.search(r"What differs in the recipes(.*?)The runs", text, re.DOTALL)[1]
    assert re.search(r"optim\.lr\s+0\.0001\s+0\.0007", fields) and re.search(r"log\.every\s+10\s+3", fields)
    assert "max_steps" not in fields and "run_dir" not in fields
    # 15 of 36 words more are wrong: of each three words 0, 1, 1, 1, 3, 3 and 3, 3, 3, 3, 3, 3
    assert re.search(r"dev\s+other\s+60\s+10\.00\u202f% ± 0\.00\s+\+50\.00 ±", text)
    assert 'data-chart="loss"' in page and 'data-chart="wer-dev"' in page


def test_one_run_named_twice_is_one_run(made, capsys, tmp_path):
    code, page, _ = report(capsys, made[0].path, made[0].path, "--out", tmp_path / "page.html")
    assert code == 0 and "Balance of the ranks" in page


def test_recordings_are_no_part_of_a_comparison(made, run, capsys):
    assert cli.main(["report", str(made[0].path), str(run.path), "--audio"]) == 2
    assert "--audio" in capsys.readouterr().err


def test_a_column_stands_at_the_right_where_all_of_it_are_numbers():
    rows = [["loss", 1, "0.1.0", "9.16\u202f% ± 0.71", None, True], ["wer", charts.NOTHING, "2.13.0+cpu", "", 5, 3]]
    assert number_columns(Table(("a", "b", "c", "d", "e", "f"), rows)) == [False, True, False, True, True, False]
    assert number_columns(Table(("a", "b"), [])) == [False, False]


def test_figures_are_written_as_people_read_them():
    assert [duration(seconds) for seconds in (4.21, 200, 3600 * 5 + 12 * 60)] == [
        "4.2\u202fs", "3\u202fmin 20\u202fs", "5\u202fh 12\u202fmin",
    ]  # fmt: skip
    assert percent(0.0916392) == "9.16\u202f%" and percent(None) == "\u2013"
