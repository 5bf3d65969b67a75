"""The page: what comes first, what it asks of the network, and who can read it."""

import html as entities
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from fastlip.study.json_types import require
from fastlip.study.report import depth_figures, drawing, html_report, robustness_figures, spectra_figures
from fastlip.study.report.arms import arms_of, title
from fastlip.study.report.drawing import log_scale
from fastlip.study.storage.schema import Results


class Reader(HTMLParser):
    """Elements with their attributes in order, and the text outside of style sheets."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.text = ""
        self.inside = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.inside.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.inside and self.inside[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_synthetic_results_are_results(world):
    require(world[1], Results, "results")


def test_answers_come_first_then_images_and_the_distortion_figure(page):
    html, verdicts = page.html, page.results["verdicts"]
    if page.results["models"][0]["role"] == "checkpoint":
        headlines, first, end = [html.index('<p id="answers">')], "<h1>", "</p>\n\n<h2"
    else:
        headlines = [html.index(f'<h3 class="answer">{entities.escape(v["headline"])}') for v in verdicts]
        first, end = "<h1>" + entities.escape(verdicts[0]["headline"]), "</section>\n\n<h2"
    first_table, first_image = html.index("<table"), html.index("<img")
    figure = html.index(f'aria-label="{entities.escape(page.figures[0].caption)}"')
    assert page.figures[0].name == "smallest-distortion"
    assert html.index(first) < headlines[0]
    assert headlines == sorted(headlines)
    assert headlines[-1] < first_image < figure < first_table
    assert html.count('role="img"', 0, figure) == 1, "no other figure stands before it"
    # Between the answers and the images there is nothing but a heading.
    answers_end = html.index(end, headlines[-1])
    assert re.sub(r"<[^>]*>", " ", html[answers_end:first_image]).split()[:4] == ["What", "it", "looks", "like"]
    assert "<details" not in html[answers_end:first_image]


def test_given_checkpoints_are_compared_and_not_asked_questions_about_arms(synthetic, render):
    """A checkpoint may have the name of an arm, which it then keeps."""
    made = synthetic(arms=("scratch", "mine & yours", "finetune"))
    results = made.results()
    for model in results["models"]:
        model |= {"role": "checkpoint", "title": model["arm"]}
    page = render(results, html_report.all_figures(results, made.distortions(results)))
    assert "<h1>scratch, mine &amp; yours, finetune</h1>" in page
    assert 'class="answer"' not in page
    text = Reader(page).text
    for words in ("Not asked", "from scratch", "re-training", "How much each question needs"):
        assert words not in text, words
    assert re.search("scratch against finetune|finetune against scratch", text)


def test_nothing_is_fetched_and_nothing_is_executed(page):
    reader = Reader(page.html)
    assert reader.inside == []
    for tag, attributes in reader.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "srcset", "poster", "action", "data"):
                assert value.startswith(("#", "data:image/png;base64,", "data:text/csv;base64,")), (tag, value[:80])
    for style in re.findall(r"<style.*?</style>", page.html, re.DOTALL):
        assert "@import" not in style
        assert not re.search(r"url\((?!#)", style)


def test_every_link_within_the_page_has_its_place(page):
    reader = Reader(page.html)
    names = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {a["href"][1:] for a in reader.all("a") if a["href"].startswith("#")} <= set(names)


def test_it_can_be_listened_to(page):
    reader = Reader(page.html)
    assert reader.all("html")[0]["lang"] == "en"
    assert all(image["alt"].strip() for image in reader.all("img"))
    drawn = [svg for svg in reader.all("svg") if svg.get("role") == "img"]
    assert len(drawn) == len(page.figures)
    assert all(len(svg["aria-label"]) > 15 for svg in drawn)
    assert all(cell["scope"] in ("col", "row") for cell in reader.all("th"))
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_every_name_is_shown_as_it_is(page):
    text = Reader(page.html).text
    for model in page.results["models"]:
        assert title(model) in text


def test_figures_are_well_formed_and_change_colour_with_the_page(page):
    for figure in page.figures:
        assert ElementTree.fromstring(figure.svg).tag.endswith("svg")
        svg = drawing.inline(figure)
        ElementTree.fromstring(svg)
        assert not re.findall(r"(?:fill|stroke|color): #", svg), figure.name
        for name in set(re.findall(r"var\(--(\w+)\)", svg)):
            assert page.html.count(f"--{name}: #") == 2, "once for light and once for dark"


def test_every_arm_has_its_line_in_the_legend(page):
    svg = page.figures[0].svg
    shown = re.findall(r"<text[^>]*>(.*?)</text>", svg)
    for arm in arms_of(page.results):
        name = arm.name if len(arm.name) <= 36 else f"{arm.name[:35]}…"
        entry = name + (f", {len(arm.models)} seeds" if len(arm.models) > 1 else "")
        assert [entities.unescape(text) for text in shown].count(entry) == 1


def test_many_runs_are_one_curve_with_a_band_for_each_arm(synthetic):
    drawn = {}
    for seeds in (1, 6):
        made = synthetic(0, ("scratch", "finetune"), seeds=seeds, layers=4)
        results = made.results()
        drawn[seeds] = [
            robustness_figures.distortion_figure(results, made.distortions(results)),
            robustness_figures.corruption_figure(results),
            depth_figures.stretch_figure(results),
            spectra_figures.weight_figure(results),
        ]
    for one, six in zip(drawn[1], drawn[6], strict=True):
        for arm in arms_of(results):
            assert strokes(one.svg, arm.colour) == strokes(six.svg, arm.colour) > 0, f"{six.name} draws every run"
            assert one.svg.count(f"fill: {arm.colour}; fill-opacity: 0.15") == 0
            assert six.svg.count(f"fill: {arm.colour}; fill-opacity: 0.15") >= 1, f"{six.name} has no bands"
        assert "means over seeds; bands: their range" in six.caption


def strokes(svg, colour):
    """The number of lines of a colour; markers are no lines."""
    return len(re.findall(rf"fill: none;[^\"]*stroke: {colour}", svg))


def test_the_page_of_many_runs_stays_small_enough_to_send(page):
    assert len(page.html.encode()) < 1.5e6


@pytest.mark.parametrize("generated", [False, True])
def test_generated_images_are_named_before_anything_else(page, generated, render):
    html = render(page.results | {"generated": generated}, page.figures)
    assert ("GENERATED IMAGES" in html) == generated
    if generated:
        assert html.index("GENERATED IMAGES</strong>") < html.index("<h1>")
        asked = page.results["models"][0]["role"] != "checkpoint"
        assert ("supported on generated images" in html) == asked


def test_the_style_sheet_has_the_backgrounds_that_colours_are_checked_on(page):
    assert re.findall(r"--(?:paper|card): (#\w+)", page.html) == ["#ffffff", "#f6f8fa", "#0d1117", "#161b22"]


def test_a_log_axis_has_plain_numbers():
    from matplotlib.figure import Figure

    for low, high in ((1e-3, 1e4), (0.02, 0.3), (2.0, 2.5)):
        axes = Figure().add_subplot()
        axes.plot([low, high], [low, high])
        log_scale(axes, "x")
        axes.figure.draw_without_rendering()
        inside = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
        assert len(inside) >= 2
        assert all(float(text) > 0 for text in inside)
        assert axes.get_yscale() == "linear"


def test_a_figure_says_where_a_limit_or_a_value_does_not_exist(synthetic):
    results = synthetic(0, ("softmax", "scratch", "finetune")).results()
    whole = robustness_figures.ratio_figure(results).svg
    assert not set("←→–") & set(texts(whole))
    assert texts(whole).count("flat boundary") == 1
    ratios = [m["ratio_median"] for m in results["models"]]
    ratios[0]["low"], ratios[1]["high"], ratios[2]["value"] = None, None, 0.0
    for m in results["models"]:
        m["flat_boundary"]["ratio"] = 0.0
    shown = texts(robustness_figures.ratio_figure(results).svg)
    assert [shown.count(mark) for mark in ("←", "→", "–", "flat boundary")] == [1, 1, 1, 0]


def texts(svg):
    return [entities.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg)]
