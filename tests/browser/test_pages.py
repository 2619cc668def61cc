"""Pages in a browser: what is drawn, what the controls change, and that nothing complains."""

import browser
import numpy as np
import pytest
from results import folder, made_up, row

from kvjax.eval.report import write_report
from kvjax.eval.report.inspect import Shown, write_inspection

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    write_report([folder(path / "in", made_up(documents=6))], path)
    return path / "report.html"


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    """Method "first" keeps the first half everywhere, "some" layer 0 and, of layer 1, head 1."""
    words = [f"word{place} " for place in range(19)] + ["end\n"]
    first, some = np.zeros((2, 2, 20), bool), np.zeros((2, 2, 20), bool)
    first[:, :, :10] = True
    some[0] = some[1, 1, 4:] = True
    path = tmp_path_factory.mktemp("inspect") / "page.html"
    return write_inspection(path, words, {"first": first, "some": some}, "Kept", {"budget": "50%"})


def show(window, path):
    window.complaints()
    window.open(path)
    assert window.run("return document.documentElement.dataset.ready") == "true"


def count(window, selector):
    return window.run("return document.querySelectorAll(arguments[0]).length", selector)


def pick(window, selector, value):
    """Set a control as a user would: the event follows the value."""
    window.run(
        """const node = document.querySelector(arguments[0]);
        node.value = arguments[1];
        const name = node.tagName === "SELECT" ? "change" : "input";
        node.dispatchEvent(new Event(name, {bubbles: true}));
        """,
        selector,
        value,
    )


# ---------------------------------------------------------------------------- the report
@pytest.mark.smoke
def test_report_has_every_section(window, report, tmp_path):
    show(window, report)
    assert window.text("h1") == "Quality against memory"
    assert count(window, ".panels svg") == 2  # a protocol each
    assert count(window, ".series") == 2 * 4  # methods but for the full cache
    assert count(window, ".series .mark") == 2 * 4 * 3  # budgets
    assert count(window, "#tasks tbody tr") == 13
    assert count(window, "#needles .map") == 13
    assert count(window, "#budgets .map") == 12
    assert count(window, "#failures tbody tr") > 5
    for name, (width, height) in {"wide": (1280, 900), "narrow": (390, 800)}.items():
        window.resize(width, height)
        assert window.run("return document.documentElement.scrollWidth") == width
        picture = window.screenshot(tmp_path / f"report-{name}.png")
        assert picture.stat().st_size > 10_000
    window.resize(1280, 900)
    assert window.complaints() == []


def test_legend_hides_a_line_and_shows_it_again(window, report):
    show(window, report)
    window.click('[data-toggle="snapkv"]')
    assert count(window, '.series[data-method="snapkv"]') == 0
    assert count(window, ".series") == 2 * 3
    window.press('[data-toggle="snapkv"]', " ")  # by keyboard too, and the focus has stayed
    assert count(window, '.series[data-method="snapkv"]') == 2
    assert window.run("return document.activeElement.dataset.toggle") == "snapkv"
    for place, lines in ((1, 0), (2, 2 * 4)):  # "none", "all"
        window.click(f".legend button:nth-last-child({place})")
        assert count(window, ".series") == lines
    assert window.complaints() == []


def test_tooltip_has_the_numbers(window, report):
    show(window, report)
    window.run("document.querySelector('.series').scrollIntoView({block: 'center'})")
    window.hover('.series[data-method="ada-snapkv"] .mark')
    said = window.text("#tip").splitlines()
    assert said[0] == "ada-snapkv at 10%"
    assert said[2].startswith("bytes held: 10.0 % of full")
    window.press("body", "\ue00c")  # Escape
    assert window.run("return document.getElementById('tip').hidden")


def test_controls_change_the_tables(window, report):
    show(window, report)
    before = window.text("#tasks tbody")
    pick(window, "#length", "4096")
    assert window.text("#tasks tbody") != before
    pick(window, "#protocol", "unseen")
    pick(window, "#measure", "nll")
    assert window.run("return document.querySelector('#tasks thead').textContent").endswith(
        "perplexity"
    )
    pick(window, "#base", "prefixkv")
    assert "prefixkv" not in window.text("#paired tbody")
    pick(window, "#budget", "50%")
    assert count(window, "#budgets .map") == 4
    pick(window, "#only", "snapkv")
    assert "streaming-llm" not in window.text("#failures tbody")
    assert window.complaints() == []


def test_headings_sort(window, report):
    show(window, report)
    column = """return [...document.querySelectorAll("#tasks tbody tr")].map(
        (line) => parseFloat(line.children[2].textContent))"""
    window.click("#tasks thead th:nth-child(3) button")
    values = window.run(column)
    assert values == sorted(values, reverse=True)
    window.click("#tasks thead th:nth-child(3) button")
    assert window.run(column) == sorted(values)
    assert window.run("return document.querySelectorAll('[aria-sort=ascending]').length") == 1


def test_dark_is_dark(window, report, tmp_path):
    window.media(**{"prefers-color-scheme": "dark"})
    show(window, report)
    colour = "return getComputedStyle(document.body).backgroundColor"
    assert window.run(colour) == "rgb(17, 22, 28)"
    window.screenshot(tmp_path / "dark.png")
    window.media(**{"prefers-color-scheme": "light"})
    assert window.run(colour) == "rgb(246, 247, 249)"


@pytest.mark.parametrize("rows", [[], [row(score=None, error="no")], [row(bytes=None)], [row()]])
def test_little_to_show(window, tmp_path, rows):
    write_report([folder(tmp_path / "in", rows)], tmp_path)
    show(window, tmp_path / "report.html")
    assert window.complaints() == []


def test_markup_in_answers_is_text(window, tmp_path):
    bad = "</script><img src=x onerror=document.title='broken'> <!--"
    rows = [row(score=0.0, prediction=bad, answers=[bad], task=bad, method=bad), row(error=bad)]
    write_report([folder(tmp_path / "in", rows)], tmp_path)
    show(window, tmp_path / "report.html")
    assert window.run("return document.title") == "kvjax report"
    assert count(window, "img") == 0
    assert bad in window.text("#failures tbody")
    assert window.complaints() == []


# ---------------------------------------------------------------------------- one prompt
def shades(window):
    """Of each token: what share of the chosen heads kept it."""
    return window.run(
        "return [...document.querySelectorAll('.t')].map((t) => +t.style.getPropertyValue('--s'))"
    )


def test_sliders_change_the_shading(window, inspection, tmp_path):
    show(window, inspection)
    assert window.text("h1") == "Kept"
    assert shades(window) == [1.0] * 10 + [0.0] * 10
    window.click("#methods button:nth-child(2)")
    assert shades(window) == [0.5] * 4 + [0.75] * 16
    pick(window, "#layer", "2")
    assert shades(window) == [0.0] * 4 + [0.5] * 16
    window.press("#head", "\ue014\ue014")  # Right, twice
    assert window.text("#head-said") == "1 of 2"
    assert shades(window) == [0.0] * 4 + [1.0] * 16
    assert window.text("#words") == (
        "some, layer 1, head 1: 16 of 20 tokens kept somewhere, 16.0 entries a head (80.0 %)."
    )
    assert count(window, ".t.gone") == 4
    assert window.screenshot(tmp_path / "inspect.png").stat().st_size > 10_000
    assert window.complaints() == []


def test_patches_are_shaded_by_the_heads_that_keep_them(window, tmp_path):
    kept = {name: np.zeros((2, 2, 8), bool) for name in ("first", "second")}
    kept["first"][:, :, 2:5] = True  # patches 0, 1 and 2 of six
    kept["first"][0, 0, 7] = True
    kept["second"][:, 1, 4:] = True
    picture = np.full((20, 30, 3), 200, np.uint8)
    words = ["<s>", *"▪" * 6, "end"]
    shown = [Shown(picture, first=1, rows=2, columns=3)]
    page = write_inspection(tmp_path / "page.html", words, kept, images=shown)
    show(window, page)
    cells = "return [...document.querySelectorAll('.patches i')].map((i) => i"
    assert window.run(f"{cells}.style.getPropertyValue('--s'))") == [
        "0.000", "1.000", "1.000", "1.000", "0.000", "0.000",
    ]  # fmt: skip
    colours = window.run(f"{cells} && getComputedStyle(i).backgroundColor)")
    assert colours[:2] == ["rgba(6, 10, 16, 0.9)", "rgba(6, 10, 16, 0)"]
    assert "3.0 of 6 patches a head" in window.text("#images-words")
    boxes = window.run(
        f"{cells}.getBoundingClientRect()).map((b) => [b.left, b.top, b.width, b.height])"
    )
    image = window.run(
        "const b = document.querySelector('.seen img').getBoundingClientRect();"
        "return [b.left, b.top, b.width / 3, b.height / 2]"
    )
    np.testing.assert_allclose(boxes[0], image, atol=1)
    np.testing.assert_allclose(boxes[5][:2], [image[0] + 2 * image[2], image[1] + image[3]], atol=1)
    window.hover(".patches i:nth-child(5)")
    assert window.text("#tip").startswith("row 1, column 1\nposition 5")
    pick(window, "#versus", "1")
    assert window.run(f"{cells}.classList.contains('only-b'))") == [False] * 4 + [True] * 2
    assert window.complaints() == []


def test_a_page_without_images_shows_none(window, inspection):
    show(window, inspection)
    assert window.run("return document.querySelector('#images').hidden")


def test_shading_is_seen(window, inspection):
    show(window, inspection)
    colour = (
        "return getComputedStyle(document.querySelectorAll('.t')[arguments[0]]).backgroundColor"
    )
    assert window.run(colour, 0) == "rgba(36, 104, 180, 0.72)"
    assert window.run(colour, 19) == "rgba(0, 0, 0, 0)"


def test_bars_choose_a_layer(window, inspection):
    show(window, inspection)
    window.click("#methods button:nth-child(2)")
    numbers = "return [...document.querySelectorAll('.bar .num')].map((one) => one.textContent)"
    assert window.run(numbers) == ["20.0", "8.0"]
    window.click(".bar:nth-child(2)")
    assert window.text("#layer-said") == "1 of 2"
    window.click(".bar:nth-child(2)")
    assert window.text("#layer-said") == "all (mean)"


def test_tokens_say_who_kept_them(window, inspection):
    show(window, inspection)
    window.click("#methods button:nth-child(2)")
    window.hover('.t[data-place="3"]')
    assert window.text("#tip").splitlines() == [
        'position 3: "word3 "',
        "some: kept in 2 of 4 heads",
    ]


def test_one_method_against_another(window, inspection):
    show(window, inspection)
    pick(window, "#versus", "1")
    # "first" less "some": 1 - 0.5, 1 - 0.75, 0 - 0.75.
    assert shades(window) == [0.5] * 4 + [0.25] * 6 + [0.75] * 10
    assert count(window, ".t.only-b") == 10


def test_the_map_chooses_layer_and_token(window, inspection):
    show(window, inspection)
    window.run(
        """const map = document.getElementById("map"), box = map.getBoundingClientRect();
        map.dispatchEvent(new MouseEvent("click", {
          clientX: box.left + box.width * 0.975, clientY: box.bottom - 2}));"""
    )
    assert window.text("#layer-said") == "1 of 2"
    assert window.run("return document.querySelector('.t.here').dataset.place") == "19"
    pixels = """const map = document.getElementById("map");
        const { data } = map.getContext("2d").getImageData(0, 0, 20, 1);
        return [...data].filter((_, place) => place % 4 === 3)"""
    alpha = window.run(pixels)
    assert len(set(alpha[:10])) == len(set(alpha[10:])) == 1
    assert alpha[0] > alpha[19]
    assert window.complaints() == []
