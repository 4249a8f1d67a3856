"""The page, its table and its sentences, from made-up runs."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from mor_jax.analysis import canvas, palette, plots, routing_plots, tables, units
from mor_jax.analysis.depth_map import depth_ansi, depth_legend_ansi, depth_map_html, save_depth_png
from mor_jax.analysis.diff import side_by_side
from mor_jax.analysis.headline import headline
from mor_jax.analysis.report import write_report
from mor_jax.analysis.runs import RunRecord
from mor_jax.analysis.token_classes import ClassLine
from mor_jax.errors import UserError

POINT = {"mean_depth": 2.0, "nll": 2.5}
CURVE = {"as_configured": POINT, "dial": [POINT], "cap": [POINT | {"max_depth": 3}]}
HOSTILE = '<script>alert("1")</script>\n\t& "quoted" </pre></style>'


@pytest.fixture(scope="module")
def runs(run_dirs):
    return [RunRecord.load(d) for d in run_dirs]


def cell(runs, label, column):
    return (
        next(r for r in tables.compare(runs) if r.label == label)
        .cells[column]
        .replace("\u00a0", " ")
    )


class Page(HTMLParser):
    """Collects what a page would load, its ids, and whether its tags are balanced."""

    VOID = ("meta", "link", "br", "path", "use", "rect", "img")

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.refs, self.tags, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            inline = value in ("data:,",) or (
                tag == "image" and value.startswith("data:image/png;base64,")
            )
            if name in ("src", "href", "xlink:href", "srcset", "data") and not inline:
                (self.refs if value.startswith("#") else self.loads).append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    tokens = ["def", " f", "(x):", "\n    ", HOSTILE]
    write_report(
        runs,
        out,
        depth_maps={"mor3": (tokens, [3, 2, 1, 0, 3], 3)},
        samples={"vanilla": HOSTILE, "mor3": "text"},
        commands={"mor3": "train --now"},
        classes={"mor3": [ClassLine("identifier", 7, (0.0, 0.5, 0.25, 0.25), None)]},
        decoded={"vanilla": [1] * 9, "mor3": [1, 2, 3] * 3},
        curves={"mor3": CURVE},
    )
    return out.read_text(encoding="utf-8")


def test_the_page_stands_alone(page):
    parsed = Page(page)
    assert parsed.loads == []
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {ref[1:] for ref in parsed.refs} <= set(parsed.ids)


def test_hostile_text_is_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_has_its_sections(page):
    for section in ("table", "curves", "depth", "looks", "samples", "configs", "reproduce", "read"):
        assert f'<section id="{section}">' in page
    assert page.count("<svg") == 12 + 3
    assert "train --now" in page
    assert "model.recursions" in page


def test_a_lonely_unfinished_run_has_a_page(tmp_path, run_dirs):
    folder = shutil.copytree(run_dirs[1], tmp_path / "half")
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:30])
    text = write_report([RunRecord.load(folder)], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "unfinished" in text
    assert "No run has been evaluated yet." in text
    assert "summary.json is missing" in text
    assert " of 23,689 steps" in text
    Page(text)


@pytest.mark.parametrize("left", ["config.json", "metrics.jsonl"])
def test_one_file_is_enough_for_a_page(tmp_path, run_dirs, left):
    (tmp_path / "run").mkdir()
    shutil.copy(run_dirs[1] / left, tmp_path / "run")
    runs = [RunRecord.load(run_dirs[0]), RunRecord.load(tmp_path / "run")]
    Page(write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8"))
    tables.print_table(runs, Console(file=io.StringIO()))


def test_table_numbers(runs):
    assert cell(runs, "Validation bits / byte, causal", 1) == units.fixed(
        runs[1].evals[-1]["causal/bits_per_byte"]
    )
    assert cell(runs, "Steps", 0) == f"{runs[0].steps:,}"
    assert (
        cell(runs, "Training FLOPs, paper", 0)
        == cell(runs, "Training FLOPs, paper", 1)
        == "2.00 PFLOPs"
    )
    # 2 (k, v) x 8 layers x 2 heads x 64 x 4 bytes
    assert cell(runs, "KV cache / token", 0) == "8.00 KiB"
    # Two layers of every token, a core of two layers at the measured 0.99 + 0.64 + 0.32 tokens.
    assert cell(runs, "KV cache / token", 1) == f"{2 + 2 * 1.95:.2f} KiB"
    assert cell(runs, "Trigram floor", 0) == "1.460"


def test_router_rows_of_a_vanilla_run_are_empty(runs):
    for label in ("Sampling accuracy", "Dead tokens", "Mean depth, causal"):
        assert cell(runs, label, 0) == units.NONE
        assert cell(runs, label, 1) != units.NONE
    assert cell(runs, "Validation NLL, top-k", 0) == cell(runs, "Validation NLL, causal", 0)


def test_the_best_is_marked_only_where_better_exists(runs):
    rows = {row.label: row for row in tables.compare(runs)}
    assert rows["Validation bits / byte, causal"].best == (False, True)
    assert rows["Training speed"].best == (False, True)
    assert rows["Steps"].best == rows["Trigram floor"].best == (False, False)
    assert rows["Validation NLL, top-k"].best == (False, False)  # not an honest score, so no winner
    assert tables.compare(runs[:1])[0].best == (False,)
    with pytest.raises(UserError):
        tables.compare([])


def test_markdown(runs):
    lines = tables.to_markdown(runs).splitlines()
    assert lines[0] == "| | vanilla | mor3 |"
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| **Validation bits / byte, causal**") for line in lines)


def test_headline_says_what_the_numbers_say(runs, make_run, tmp_path):
    said = " ".join(headline(runs).sentences)
    assert re.search(r"mor3 reaches 1\.\d+ bits per byte, [\d.]+\s% better than vanilla", said)
    assert "at the same training FLOPs" in said
    assert "0.50× the unique parameters" in said
    assert "Both beat the floor" in said
    worse = RunRecord.load(make_run(tmp_path / "w", "weak", recursions=3, gain=-2.0, budget=1e15))
    said = " ".join(headline([runs[0], worse]).sentences)
    assert "worse than vanilla" in said and "at 0.50 times the training FLOPs" in said
    assert "weak did not beat a byte trigram model" in said
    assert [c.best for c in headline([runs[0], worse]).cards] == [True, False]


def test_configs_side_by_side(runs):
    fields = {f.name: f for f in side_by_side([r.config_dict for r in runs])}
    assert fields["model.recursions"].cells == ("1", "3") and fields["model.recursions"].differs
    assert not fields["model.width"].differs
    assert side_by_side([{"a": {"b": 1}}, {}])[0].cells == ("1", units.NONE)


def test_every_plot_saves(runs, tmp_path):
    drawn = plots.all_plots(runs)
    assert len({p.key for p in drawn}) == len(drawn) == 12
    svg = canvas.to_svg(drawn[0].figure, "x")
    assert svg.startswith("<svg") and "var(--s0, #0072b2)" in svg
    assert "byte trigram model" in svg  # text stays text
    assert svg == canvas.to_svg(plots.all_plots(runs)[0].figure, "x")  # same runs, same page
    canvas.save_png(drawn[0].figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_growth_of_the_cache_follows_the_depths(runs):
    """Two layers of every token, and a core of two layers as often as it was run; unrolled, eight
    layers."""
    figure = routing_plots.kv_growth(runs, {"vanilla": [1] * 4, "mor3": [1, 3, 2, 1]})
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    layer = 2 * 2 * 64 * 4 / 1024  # k, v; kv heads; head dimension; bytes
    assert lines["vanilla"] == [8 * layer * n for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(lines["mor3"], np.cumsum([2 + 2, 2 + 6, 2 + 4, 2 + 2]) * layer)
    assert lines["all tokens at full depth"] == lines["vanilla"]


def test_a_histogram_darkens_where_the_scores_are(runs):
    figure = routing_plots.score_histogram(runs[1])
    image = np.asarray(figure.axes[-1].images[0].get_array())
    assert image.shape == (20, 48)
    assert image[:, 0].argmax() == 9  # at first all scores are near a half ...
    assert image[9, -1] < 0.1 < image[15, -1]  # ... at last none is
    assert routing_plots.score_histogram(runs[0]) is None


def test_depth_map_html():
    fragment = depth_map_html(["a", " <b>", "\n"], [0, 2, 1], 2)
    Page(fragment)
    assert "&lt;b&gt;" in fragment and "<b>" not in fragment
    assert 'title="\\n · depth 1"' in fragment
    assert "33" in fragment and "depth 2" in fragment
    assert "mor-legend" not in depth_map_html(["a"], [0], 2, legend=False).split("</style>")[1]


def test_depth_map_in_a_terminal():
    text = depth_ansi(["ab", "c\n"], [0, 3], 3)
    assert text.plain == "abc\n"
    assert len(text.spans) == 2
    assert " 3 " in depth_legend_ansi(3).plain


def test_depth_map_picture(tmp_path):
    tokens = ["word ", "\t", "x" * 300, "\n", "日本$_^", "\x00"] * 40
    save_depth_png(tokens, [1, 0, 2, 3, 1, 2] * 40, 3, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    save_depth_png([], [], 3, tmp_path / "e.png")


def test_depth_maps_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="one depth a token"):
        depth_map_html(["a"], [], 2)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        depth_ansi(["a"], [3], 2)


def test_depth_colours_are_readable_and_ordered():
    for max_depth in range(1, 9):
        pairs = [palette.depth_colour(d, max_depth) for d in range(max_depth + 1)]
        assert all(palette.contrast(*pair) >= 4.5 for pair in pairs)
        lightness = [palette.contrast(background, "#000000") for background, _ in pairs]
        assert lightness == sorted(lightness, reverse=True)
    for light, dark in palette.SERIES:
        assert palette.contrast(light, "#ffffff") >= 3 and palette.contrast(dark, "#171b20") >= 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.si(555.7e6, "FLOPs"), "556 MFLOPs"),
        (units.si(999.96e3), "1.00M"),
        (units.si(None), units.NONE),
        (units.count(118_000_000), "118M"),
        (units.count(1.61e9), "1.61B"),
        (units.count(9438), "9438"),
        (units.size(6041.6), "5.90 KiB"),
        (units.percent(0.5), "50.0 %"),
        (units.fixed(float("nan")), units.NONE),
        (units.duration(45), "45 s"),
        (units.duration(7200), "2.0 h"),
        (units.si(0, "B"), "0 B"),
    ],
)
def test_units(text, expected):
    assert text.replace("\u00a0", " ") == expected


def test_a_model_above_the_trigram_model_is_not_said_to_be_below(make_run, tmp_path):
    weak = RunRecord.load(make_run(tmp_path / "w", "weak", gain=-2.0))
    said = " ".join(headline([weak]).sentences)
    assert "weak did not beat a byte trigram model" in said and "elow" not in said


def test_scores_on_different_text_are_named_and_not_compared(runs, tmp_path):
    shutil.copytree(runs[1].path, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["holdout"] = 0.3
    path.write_text(json.dumps(config))
    found = headline([runs[0], RunRecord.load(tmp_path / "other")])
    said = " ".join(found.sentences)
    assert "do not compare" in said and "bits per byte" in said
    assert (
        "better" not in said and "worse" not in said and not any(card.best for card in found.cards)
    )


@pytest.mark.parametrize("last", [1, 2])
def test_a_curve_of_one_record_shows(runs, tmp_path, last):
    """The line of a run that has just begun is a dot; one of two records is a line."""
    directory = tmp_path / "begun"
    shutil.copytree(runs[1].path, directory)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = sorted({r["step"] for r in lines if r["kind"] == "train"})[:last]
    kept = [r for r in lines if r["kind"] == "train" and r["step"] in steps]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    for plot in plots.all_plots([RunRecord.load(directory)]):
        canvas.to_svg(plot.figure, "x")
        for axes in plot.figure.axes:
            for line in axes.get_lines():
                finite = np.isfinite(np.asarray(line.get_ydata(), float)).sum()
                assert finite != 1 or line.get_marker() not in ("None", "", None), plot.key
