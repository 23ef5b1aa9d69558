import base64
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from vlm.report import Marked, Report
from vlm.report.curves import curves_svg, nice_ticks, thin_points
from vlm.report.marks import format_value, markdown_text

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert("x")</script> & | *b* `c` [d](e)'


class _Outline(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "rect", "line", "circle", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in ("path", "line", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _outline(report: Report) -> _Outline:
    outline = _Outline()
    outline.feed(report.html())
    outline.close()
    return outline


def _picture(width=8, height=4) -> Image.Image:
    image = Image.new("RGB", (width, height), (200, 10, 10))
    image.putpixel((1, 2), (0, 255, 7))
    return image


def _full_report() -> Report:
    report = Report(f"T {NASTY}", NASTY).heading(NASTY).text(f"one {NASTY}\n\ntwo").code(NASTY)
    report.figures([(NASTY, Marked(NASTY, "good"), NASTY)])
    report.table(["set", NASTY], [[NASTY, 1.25], [Marked(NASTY, "bad"), None]], caption=NASTY)
    report.curves({NASTY: [(1, 2.0), (2, 1.0)]}, NASTY, NASTY, caption=NASTY)
    return report.pictures([(_picture(), [NASTY, Marked(NASTY, "quiet")])], caption=NASTY)


def test_no_text_of_the_user_becomes_markup():
    outline = _outline(_full_report())
    assert outline.open == []
    assert "script" not in {tag for tag, _ in outline.seen}
    assert outline.text.count(NASTY) >= 13
    markdown = re.sub(r"```.*?```", "", _full_report().markdown(), flags=re.S)
    assert "<" not in markdown
    unescaped = re.sub(r"\\.", "", markdown)
    assert "`" not in unescaped and "*b" not in unescaped and "](" not in unescaped


def test_the_page_refers_to_nothing_outside_itself():
    for tag, attributes in _outline(_full_report()).seen:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    assert not re.search(r"url\(|@import", _full_report().html())


def test_pictures_are_lossless_and_scaled_by_whole_pixels():
    outline = _outline(Report("t").pictures([(_picture(64, 32), []), (_picture(190, 20), ["wide"]), (_picture(900, 20), [])], scale=3))
    pictures = [attributes for tag, attributes in outline.seen if tag == "img"]
    assert [(picture["width"], picture["height"]) for picture in pictures] == [("192", "96"), ("380", "40"), ("900", "20")]
    stored = Image.open(io.BytesIO(base64.b64decode(pictures[0]["src"].partition(",")[2])))
    assert stored.tobytes() == _picture(64, 32).tobytes()


def test_numbers_stand_right_and_words_left():
    rows = [["a", 1.0, 2], ["b", Marked(None, "quiet"), "x"], ["c", Marked(3, "bad"), 4]]
    outline = _outline(Report("t").table(["kind", "score", "mixed"], rows))
    assert [attributes.get("class") for tag, attributes in outline.seen if tag == "th"] == [None, "number", None]
    assert "|---|---:|---|" in Report("t").table(["kind", "score", "mixed"], rows).markdown()


@pytest.mark.parametrize(
    "value, text",
    [(None, "–"), (1234567, "1,234,567"), (3.14159, "3.1"), (0.00012, "0.00012"), (0.0, "0.0"), (True, "yes"), (math.nan, "nan")],
)
def test_values_are_written_for_readers(value, text):
    assert format_value(value) == text


def test_marks_show_without_colour():
    markdown = Report("t").table(["a"], [[Marked(1.0, "best")], [Marked("no", "bad")], [Marked("yes", "good")]]).markdown()
    assert "| **1.0** |" in markdown and "| no ✗ |" in markdown and "| yes ✓ |" in markdown
    with pytest.raises(ValueError, match="'great' is unknown; expected one of best, good, bad, quiet"):
        Marked(1, "great")


def test_markdown_does_not_start_a_list_or_heading_by_accident():
    assert [markdown_text(text) for text in ("# x", "- x", "12. x", "a\nb")] == ["\\# x", "\\- x", "12\\. x", "a b"]


def test_curves_run_from_left_to_right_and_higher_is_up():
    root = ElementTree.fromstring(curves_svg({"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)]}, "step", "loss"))
    path = next(item for item in root.iter(f"{SVG}path") if item.findtext(f"{SVG}title") == "a")
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split())) for pair in path.get("d")[1:].split("L")]
    assert x0 < x1 and y0 > y1
    point = root.find(f"{SVG}circle")
    assert float(point.get("cx")) == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert float(point.get("cy")) == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert {"step", "loss", "a", "b"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_points_left_out_are_counted_in_the_legend():
    words = curves_svg({"a": [(0, 1.0), (1, math.nan), (2, -1.0), (3, 0.5)]}, "x", "y", log_y=True)
    assert ">a (left out: 2)<" in words and "nan" not in words
    with pytest.raises(ValueError, match=r"no finite point in 1 curves \(a\)"):
        curves_svg({"a": [(0, math.inf)]}, "x", "y")


@pytest.mark.parametrize("points", [[(3, 3)], [(0, 0), (0, 0)], [(0, -5), (1, -5)], [(1e-9, 1e9), (2e-9, 2e9)]])
@pytest.mark.parametrize("log_y", [False, True])
def test_flat_and_extreme_curves_stay_inside_the_picture(points, log_y):
    if log_y:
        points = [(x, abs(y) + 1) for x, y in points]
    root = ElementTree.fromstring(curves_svg({"a": points}, "x", "y", log_y=log_y))
    _, _, width, height = map(float, root.get("viewBox").split())
    places = [(float(item.get("cx")), float(item.get("cy"))) for item in root.iter(f"{SVG}circle")]
    for item in root.iter(f"{SVG}path"):
        if item.find(f"{SVG}title") is not None:
            places += [tuple(map(float, pair.split())) for pair in item.get("d")[1:].split("L")]
    assert places and all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 105) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(0.12, 0.31) == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert nice_ticks(2, 2) == [2]


def test_thinning_keeps_order_and_extremes():
    points = [(x, math.sin(x)) for x in range(10_000)]
    points[777] = (777, 50.0)
    thin = thin_points(points)
    assert len(thin) <= 800 and thin == sorted(thin) and max(y for _, y in thin) == 50.0
    assert min(y for _, y in thin) == min(y for _, y in points)


def test_smoothing_follows_a_line_without_lag():
    line = [(x, 2.0 * x) for x in range(50)]
    root = ElementTree.fromstring(curves_svg({"a": line}, "x", "y", smooth=9))
    raw, smooth = [item.get("d") for item in root.iter(f"{SVG}path") if item.find(f"{SVG}title") is not None]
    assert raw == smooth


def test_written_markdown_shows_its_pictures_and_curves(tmp_path):
    written = _full_report().write(tmp_path / "run")
    assert written == tmp_path / "run" / "report.html" and written.read_text(encoding="utf-8") == _full_report().html()
    markdown = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    names = re.findall(r"pictures/[a-z0-9_.]+", markdown)
    assert len(names) == 2 and all((tmp_path / "run" / name).is_file() for name in names)
    assert {path.name for path in (tmp_path / "run" / "pictures").iterdir()} == {name.partition("/")[2] for name in names}
    assert "pictures/" not in _full_report().markdown()


def test_contents_link_to_sections_of_the_same_name():
    outline = _outline(Report("t").heading("A b").heading("A b").heading("?"))
    anchors = [attributes["id"] for tag, attributes in outline.seen if tag == "h2"]
    assert anchors == ["a-b", "a-b-2", "section"]
    assert [attributes["href"] for tag, attributes in outline.seen if tag == "a"] == ["#" + anchor for anchor in anchors]


def test_wrong_use_says_what_was_found(tmp_path):
    report = Report("t")
    with pytest.raises(ValueError, match=r"row 1 of the table has 1 cells for 2 headers \(a, b\)"):
        report.table(["a", "b"], [[1, 2], [1]])
    with pytest.raises(FileNotFoundError, match="no image at"):
        report.pictures([(tmp_path / "none.png", [])])
    with pytest.raises(ValueError, match="scale = 0"):
        report.pictures([], scale=0)
    with pytest.raises(ValueError, match="smooth = 0"):
        report.curves({"a": [(0, 1)]}, "x", "y", smooth=0)
    assert report.blocks == []


def test_a_photograph_is_kept_small_and_a_drawing_exact(tmp_path):
    """Twenty photographs as PNG made pages of tens of megabytes."""
    drawn = Image.new("RGB", (400, 300), (10, 200, 30))
    photo = Image.effect_noise((400, 300), 30).convert("RGB")
    page = Report("Pictures").pictures([(drawn, "drawn"), (photo, "photo")])
    assert page.html().count("data:image/png") == page.html().count("data:image/jpeg") == 1
    page.write(tmp_path)
    assert sorted(path.suffix for path in (tmp_path / "pictures").iterdir()) == [".jpg", ".png"]
