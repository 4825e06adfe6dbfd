"""The report in a real browser: it draws, plays, sorts, prints and fits a phone; nothing that a run's files say runs.

Chromium and its driver are Debian's packages; `make test` installs them. Where they are missing these tests are
skipped, and a skipped test fails CI.
"""

import re
import subprocess
from collections import Counter
from itertools import pairwise

import pytest
from rich_run import write_rich_run
from selenium.webdriver.common.keys import Keys

from asr_train.files import read_json, write_json
from asr_train.run_dir import RunDir
from launch import cli

# What would run, load or break out, wherever it was put in as it is.
ATTACK = (
    "</script></title></textarea><img src=x onerror=window.attacked=1><script>window.attacked=1</script>"
    "\"'><svg onload=window.attacked=1> {{ 7 * 6 }} %{x} <a href='javascript:window.attacked=1'>here</a> \u202edlrow"
)
ARABIC = ("أريد بطاقة جديدة", "أريد بطاقات جديدة")


@pytest.fixture(scope="module")
def page(tiny_recipe, tiny_corpus, tmp_path_factory):
    """The report of a rich run in which everything that a user or a disk can name is hostile."""
    path = tmp_path_factory.mktemp("report") / "run <img src=x onerror=window.attacked=1>"
    dev = tiny_corpus.sets["dev"]
    texts = [(ATTACK, "won"), ("one", ATTACK), ARABIC, *[("one two tree seven", "one tool tree")] * (len(dev) - 3)]
    pairs = {dev.id(row): text for row, text in zip(range(len(dev)), texts, strict=True)}
    pairs[ATTACK] = ("an id of an utterance", "an idea")
    write_rich_run(
        path, tiny_recipe(**{"model.pretrained": ATTACK}), tiny_corpus, pairs=pairs, message=ATTACK, host=ATTACK
    )
    assert cli.main(["report", str(path), "--audio"]) == 0
    return path / "report.html"


@pytest.fixture
def opened(window, page):
    """The page on a desktop's screen, fresh."""
    window.resize(1280, 900)
    window.open(page)
    return window


def test_every_chart_is_drawn_without_a_word_on_the_console_or_a_request(opened):
    assert opened.run("return document.documentElement.dataset.ready") == "yes"
    drawn = opened.run(
        "return [...document.querySelectorAll('[data-chart]')].map(place => [place.dataset.chart,"
        " place.querySelectorAll('.trace path, .trace .point').length, place.querySelector('.main-svg').clientWidth])"
    )
    assert {name for name, _, _ in drawn} == {
        "loss", "lr", "grad_norm", "loss_scale", "audio_s_per_s", "memory_bytes", "wer", "cer", "wer-by-length",
        "ledger", "timeline", "balance", "lengths",
    }  # fmt: skip
    assert [name for name, num_paths, width in drawn if not num_paths or width < 300] == []
    assert opened.read_log() == ([], [])


def test_nothing_that_the_files_say_runs_or_becomes_part_of_the_page(opened):
    assert opened.run("return window.attacked") is None
    assert opened.find("img, svg[onload], a[href^=javascript], iframe, textarea") == []
    text = opened.run("return document.body.innerText")
    assert text.count("<script>window.attacked=1</script>") >= 5, "id, message, host, recipe and words, as they are"
    assert "{{ 7 * 6 }}" in text and "onerror" in opened.driver.title
    opened.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    opened.run("document.querySelectorAll('[href^=\"#\"]').forEach(link => link.click())")
    assert opened.run("return window.attacked") is None


def test_a_script_that_came_in_after_all_would_not_run(opened):
    """The page's policy holds even where the escaping would fail."""
    opened.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.attacked=1\">')")
    opened.run("const script = document.createElement('script'); script.textContent = 'window.attacked=1';"
               "document.body.append(script)")  # fmt: skip
    opened.wait("new Promise(done => setTimeout(() => done(true), 200))")
    assert opened.run("return window.attacked") is None
    console, asked = opened.read_log()
    assert any("Content Security Policy" in message for message in console) and asked == []


def test_a_recording_plays(opened):
    assert len(opened.find("audio")) > 10
    opened.run("window.player = document.querySelector('audio'); window.player.play()")
    opened.wait("window.player.currentTime > 0.05 || window.player.ended")
    assert opened.run("return window.player.error") is None
    assert opened.run("return window.player.duration") > 0.4


def test_one_recording_plays_at_a_time(opened):
    opened.run("window.players = document.querySelectorAll('audio'); window.players[0].loop = true;"
               "window.players[0].play()")  # fmt: skip
    opened.wait("!window.players[0].paused")
    opened.run("window.players[1].play()")
    opened.wait("window.players[0].paused")


def column(opened, table, number):
    script = "return [...arguments[0].tBodies[0].rows].map(row => row.cells[arguments[1]].textContent.trim())"
    return opened.run(script, table, number)


def test_tables_are_sorted_by_mouse_and_by_keyboard(opened):
    table = next(table for table in opened.find("table.sortable") if "steps lost" in table.text)
    header = next(
        cell for cell in table.find_elements("css selector", "thead th") if cell.text.startswith("steps lost")
    )
    number = [cell.text for cell in table.find_elements("css selector", "thead th")].index(header.text)
    assert column(opened, table, number) == ["4", "0", "0", "5", "0"]
    button = header.find_element("css selector", "button")
    opened.run("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    assert column(opened, table, number) == ["0", "0", "0", "4", "5"]
    assert header.get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.ENTER)
    assert column(opened, table, number) == ["5", "4", "0", "0", "0"]
    assert header.get_attribute("aria-sort") == "descending"


def test_utterances_are_sorted_by_what_they_are_asked_for(opened):
    def shown(key):
        return opened.run(f"return [...document.querySelectorAll('#worst-1 > li')].map(item => item.dataset.{key})")

    def button(key):
        return opened.find(f"[data-sorts=worst-1] [data-key={key}]")[0]

    assert shown("wer") == sorted(shown("wer"), key=float, reverse=True)
    opened.run("arguments[0].scrollIntoView({block: 'center'})", button("seconds"))
    button("seconds").click()
    assert shown("seconds") == sorted(shown("seconds"), key=float, reverse=True)
    assert button("seconds").get_attribute("aria-pressed") == "true"
    assert button("wer").get_attribute("aria-pressed") == "false"
    button("seconds").send_keys(Keys.SPACE)
    assert shown("seconds") == sorted(shown("seconds"), key=float)
    button("wer").send_keys(Keys.ENTER)
    assert shown("wer") == sorted(shown("wer"), key=float, reverse=True)


def test_errors_are_marked_by_letters_and_lines_not_by_colour_alone(opened):
    item = next(
        item for item in opened.find("#worst-1 > li") if "one two tree seven" in item.get_attribute("innerHTML")
    )
    marks = opened.run(
        "const words = [...arguments[0].querySelectorAll('.word')];"
        "return words.map(word => [...word.children].map(part => part.textContent))",
        item,
    )
    assert marks == [["one", "one", ""], ["two", "tool", "S"], ["tree", "tree", ""], ["seven", "∅", "D"]]
    style = "return getComputedStyle(document.querySelector(arguments[0])).textDecorationLine"
    lines = [opened.run(style, selector) for selector in (".sub .hyp", ".del .ref", ".ins .hyp")]
    assert lines == ["underline", "line-through", "underline"]
    styles = {opened.run(f"return getComputedStyle(document.querySelector('{name}')).borderTopStyle")
              for name in (".sub", ".del", ".ins")}  # fmt: skip
    assert len(styles) == 3
    spoken = opened.run("return arguments[0].querySelector('.hidden').textContent.replace(/\\s+/g, ' ')", item)
    assert "Heard: one tool tree" in spoken and "two became tool; seven is missing." in spoken


def test_a_text_from_right_to_left_is_set_so(opened):
    first, last = opened.run(
        "const item = [...document.querySelectorAll('.aligned')].find(item => item.textContent.includes('بطاقة'));"
        "const words = [...item.querySelectorAll('.word')].map(word => word.getBoundingClientRect().left);"
        "return [words[0], words.at(-1)]"
    )
    assert first > last


def test_everything_has_a_name_for_who_cannot_see_it(opened):
    unnamed = opened.run(
        "const parts = '[role=img], audio, nav, section, figure, [role=region], [role=toolbar]';"
        "const title = part => document.getElementById(part.getAttribute('aria-labelledby'))?.textContent;"
        "return [...document.querySelectorAll(parts)].filter(part => !part.ariaLabel && !title(part))"
        ".map(part => part.outerHTML.slice(0, 200))"
    )
    assert unnamed == []
    assert opened.run("return document.documentElement.lang") == "en"
    levels = opened.run("return [...document.querySelectorAll('h1, h2, h3')].map(title => Number(title.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    repeated = opened.run(
        "const ids = [...document.querySelectorAll('main [id], nav [id]')].map(part => part.id);"
        "return ids.filter((id, at) => ids.indexOf(id) !== at)"
    )
    assert repeated == []


def test_the_first_tab_leads_past_the_links_and_every_table_can_be_reached(opened):
    body = opened.find("body")[0]
    body.send_keys(Keys.TAB)
    assert opened.run("return document.activeElement.className") == "skip"
    assert opened.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert opened.run("return [...document.querySelectorAll('.scroll')].every(part => part.tabIndex === 0)")


def test_on_a_phone_nothing_makes_the_page_wider_than_the_screen(window, page):
    window.resize(360, 780, scale=2, is_phone=True)
    window.open(page)
    assert window.run("return [document.documentElement.scrollWidth, window.innerWidth]") == [360, 360]
    widths = window.run("return [...document.querySelectorAll('.plot .main-svg')].map(chart => chart.clientWidth)")
    assert widths and max(widths) <= 360 and min(widths) > 250
    tops = window.run("return [...document.querySelectorAll('.facts > div')].map(card => card.offsetTop)")
    assert max(Counter(tops).values()) == 2, "cards stand in pairs"
    hidden = window.run(  # a chart under its legend keeps a height that can be read
        "return [...document.querySelectorAll('.plot')].map(place => [place.dataset.chart,"
        " place.querySelector('.nsewdrag').getBoundingClientRect().height])"
    )
    assert [name for name, height in hidden if height < 60] == []


def test_in_the_dark_the_text_is_light(opened):
    opened.prefer("dark")
    try:
        colours = opened.run(
            "return [getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('.plot .xtick text')).fill]"
        )
    finally:
        opened.prefer("light")
    page_colour, text_colour = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours)
    assert max(page_colour) < 64 and min(text_colour) > 192


def test_on_paper_the_charts_and_tables_stand_within_its_margins(opened, tmp_path):
    opened.pdf(tmp_path / "page.pdf")
    laid = subprocess.run(
        ["pdftotext", "-bbox", str(tmp_path / "page.pdf"), "-"], capture_output=True, text=True, check=True
    ).stdout
    pages = re.findall(r'<page width="([\d.]+)".*?>(.*?)</page>', laid, re.DOTALL)
    assert len(pages) > 2
    words = [
        (float(left), float(right), float(width), word)
        for width, content in pages
        for left, right, word in re.findall(r'<word xMin="([\d.-]+)".*?xMax="([\d.-]+)".*?>(.*?)</word>', content)
    ]
    assert [word for left, right, width, word in words if left < 20 or right > float(width) - 20] == []
    text = " ".join(word for *_, word in words)
    for said in (
        "audio-seconds",
        "useful compute",
        "attempt 4",
        "CTC",
        "wall time, by the clock",
    ):
        assert said in text, said
    assert "Sort by" not in text
    # and back on the screen the charts have their width again
    opened.wait("document.querySelector('.plot .main-svg').clientWidth !== 660")


def test_a_comparison_lays_the_curves_over_each_other(window, page, tiny_recipe, tiny_corpus, tmp_path):
    other = RunDir(tmp_path / "other")
    dev = tiny_corpus.sets["dev"]
    pairs = {dev.id(row): ("one two", "one too") for row in range(len(dev))}
    write_rich_run(other.path, tiny_recipe(**{"optim.lr": 3e-4}), tiny_corpus, pairs=pairs, lowest_wer=0.1)
    identity = read_json(other.path / "run.json")
    write_json(other.path / "run.json", {**identity, "name": ATTACK})
    both = tmp_path / "both.html"
    assert cli.main(["report", str(page.parent), str(other.path), "--out", str(both)]) == 0
    window.resize(1280, 900)
    window.open(both)
    assert window.read_log() == ([], [])
    curves = window.run(
        "return document.querySelectorAll('[data-chart=loss] .scatterlayer .trace path.js-line').length"
    )
    assert curves == 2
    assert "onerror" in window.run("return document.querySelector('[data-chart=loss] .legend').textContent")
    assert window.run("return window.attacked") is None
    assert window.find("[data-chart]:not([data-drawn])") == []
