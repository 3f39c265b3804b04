"""report.html: complete without the network, every number as in report.json, readable in a browser at a phone's width."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from attnres import inputs, report, report_html, report_lines, report_output, triton_interpreter
from attnres.inputs import Shape

triton_interpreter.use_without_gpu()

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, ids, tables by caption (cells as text), headings; checks that every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self._open: list[str] = []
        self._text = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert self._open == []
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption", "h1", "h2", "h3", "title"):
            self._text = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self._rows[-1].append(self._text.strip())
        elif tag == "caption":
            self._caption = self._text
        elif tag in ("h1", "h2", "h3", "title"):
            self.headings.append(self._text)
        elif tag == "table":
            self.tables[self._caption] = self._rows

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def found() -> report.Report:
    """A small run of two backends, a pretended third, and a compiled kernel."""
    shapes = ((Shape(3, 24, 3, 2), "normal"), (Shape(2, 40, 5, 2), "normal"), (Shape(3, 24, 3, 2), "peaked"))
    jobs = [
        report.Job(op, shape, kind, dtype) for op in inputs.OPS for shape, kind in shapes for dtype in ("bf16", "fp32")
    ]
    jobs.append(report.Job("mix", Shape(2, 384, 4, 2), "captured", "bf16"))
    made = report.run(jobs, ["torch", "triton"], torch.device("cpu"))
    made.rows += [dataclasses.replace(row, backend="cute") for row in made.rows if row.backend == "triton"]
    made.rows.append(
        report.Row("mix", "forward", "", "cute", "fp32", "T3 D20 L3", "normal", "refused", note="D is <20>")
    )
    made.pairs += [dataclasses.replace(pair, first="triton", second="cute", verdict="ok") for pair in made.pairs]
    made.kernels.append(report.Kernel("mix_fwd", "D=2048 L=9", 168, 0, 200_000, {"UBLKCP": 2, "SYNCS": 9}, "ok"))
    made.metadata["cute"] = "compiled, not run: no GPU"
    return made


@pytest.fixture(scope="module")
def page(found: report.Report) -> Page:
    return Page(report_html.to_html(found))


def test_the_page_is_complete_without_the_network(found: report.Report, page: Page) -> None:
    text = report_html.to_html(found)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    targets = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert targets
    assert {(value or "")[:1] for value in targets} == {"#"}
    assert {(value or "")[1:] for value in targets} <= set(page.ids)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    assert len(page.ids) == len(set(page.ids))


def test_all_sections_are_there(found: report.Report, page: Page) -> None:
    assert page.headings[0] == f"attnres accuracy report: {found.metadata['device']}, all within budget"
    sections = [
        "Summary",
        "Dtypes and storage formats",
        "Precision at risk",
        *inputs.OPS,
        "Inputs",
        "normal",
        "peaked",
        "captured",
    ]
    assert page.headings[2:] == [*sections, "Backend against backend", "CuTe kernels", "Refused", "Metadata"]
    linked = [attributes["href"] for attributes in page.all("a")]
    assert len(linked) == 1 + len(
        [attributes for attributes in page.all("section") if "input-" not in str(attributes["id"])]
    )
    # four figures an operation, the inputs, the backends
    assert len(page.all("svg")) == 4 * len(inputs.OPS) + 2
    assert "Every result is within its error budget." in report_html.to_html(found)


def test_accessible(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert {attributes.get("name"): attributes.get("content") for attributes in page.all("meta")}["viewport"]
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        assert len(str(attributes["aria-label"])) > 40
    assert len(page.all("caption")) == len(page.all("table"))
    assert {attributes["scope"] for attributes in page.all("th")} == {"col", "row"}
    regions = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(regions) == len(page.all("table"))
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)
    for rows in page.tables.values():
        assert len({len(row) for row in rows}) == 1
        assert len(rows) > 1


def same(shown: str, value: float | None) -> bool:
    """Whether a cell shows the number: nothing for none (and for no ratio), else rounded to three digits or less."""
    if not shown or not value:
        return shown in (report_lines.number(value), report_lines.ratio(value))
    return abs(float(shown) - value) <= 0.006 * abs(value) or shown == report_lines.ratio(value)


def test_the_tables_have_the_numbers_of_the_json(found: report.Report, page: Page) -> None:
    written = json.loads(report_output.to_json(found))
    for op in inputs.OPS:
        rows = [row for row in written["rows"] if row["op"] == op and row["verdict"] != "refused"]
        header, *lines = page.tables[f"{op}: every tensor of every case"]
        cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
        for row in rows:
            case = cases.setdefault(tuple(row[name] for name in ("tensor", "dtype", "shape", "kind")), {})
            case[row["backend"]] = row
        assert len(lines) == len(cases)
        for line, (key, case) in zip(lines, cases.items(), strict=True):
            cells = dict(zip(header, line, strict=True))
            assert tuple(line[:4]) == key
            for backend in ("torch", "triton", "cute"):
                row = case[backend]
                for number in ("error", "floor", "budget", "largest"):
                    assert same(cells[f"{backend} {number}"], row[number])
                assert same(cells[f"{backend} used"], row["used"]) or cells[f"{backend} used"] == row["verdict"] == "ok"
        by_case = {tuple(row[name] for name in ("tensor", "backend", "dtype", "shape", "kind")): row for row in rows}
        header, *lines = page.tables[f"{op}: distribution of the error over rows, in units of row RMS"]
        assert len({line[0] for line in lines}) == len({row["tensor"] for row in rows if row["error"] is not None})
        for line in lines:
            row = by_case[tuple(line[:5])]
            quantiles = [*row["row_errors"].values(), row["row_floors"]["p50"], row["row_floors"]["max"]]
            assert all(same(shown, value) for shown, value in zip(line[5:], quantiles, strict=True))
        header, *lines = page.tables[f"{op}: error against the number of sources, normal inputs"]
        assert header[3:] == ["3", "5"]
        for direction, backend, dtype, *errors in lines:
            for sources, shown in zip((3, 5), errors, strict=True):
                candidates = [
                    row["error"]
                    for row in rows
                    if (row["direction"], row["backend"], row["dtype"], row["kind"])
                    == (direction, backend, dtype, "normal")
                    and row["sources"] == sources
                    and (row["tensor"] == "out" or direction == "gradient")
                ]
                assert same(shown, max(candidates))
    header, *lines = page.tables["Largest difference of each tensor"]
    differences = {(p["tensor"], p["op"], f"{p['first']}, {p['second']}"): 0.0 for p in written["pairs"]}
    for pair in written["pairs"]:
        key = (pair["tensor"], pair["op"], f"{pair['first']}, {pair['second']}")
        differences[key] = max(differences[key], pair["difference"])
    assert len(lines) == len(differences)
    assert all(same(line[4], differences[line[0], line[1], line[3]]) for line in lines)
    header, *lines = page.tables["Budget used by format"]
    assert [line[0] for line in lines] == ["bf16", "fp32"]
    for line in lines:
        for column, shown in zip(header[1:], line[1:], strict=True):
            op, backend = column.split()
            mine = [
                row for row in written["rows"] if (row["op"], row["backend"], row["dtype"]) == (op, backend, line[0])
            ]
            used = [row["used"] for row in mine if row["used"] is not None and row["direction"] == "forward"]
            assert shown.split("/")[0] == f"{max(used):.2f}"
    (kernel,) = page.tables["Kernels for sm_90a"][1:]
    assert kernel == ["mix_fwd", "D=2048 L=9", "168", "0", "200000", "2", "9", "0", "ok"]
    assert dict(page.tables["The run"][1:]) == written["metadata"]
    assert page.tables["Cases that a backend does not take, by reason"][1:] == [["cute", "1", "D is <20>"]]


def test_what_is_broken_stands_first(found: report.Report) -> None:
    rows = [dataclasses.replace(found.rows[0], verdict="broken", used=3.0, error=0.01), *found.rows[1:]]
    worse = [dataclasses.replace(found.pairs[-1], verdict="worse")]
    broken = dataclasses.replace(found, rows=rows, pairs=found.pairs + worse)
    text = report_html.to_html(broken)
    page = Page(text)
    assert page.headings[0].endswith("2 broken")
    assert page.headings[3] == "Broken"
    for item in broken.broken:
        assert report_lines.describe(item) in text
    summary = {tuple(line[:2]): line[2] for line in page.tables[next(iter(page.tables))][1:]}
    assert summary[("mix", "torch")] == "broken"
    assert summary[("mix", "triton")] == "ok"


def test_a_report_of_compiled_kernels_alone() -> None:
    kernel = report.Kernel("mix_fwd", "D=64", 40, 0, 1000, {}, "ok")
    made = report.Report(
        {**report.describe(torch.device("cpu")), "cute": "compiled, not run: no GPU"}, kernels=[kernel]
    )
    page = Page(report_html.to_html(made))
    assert page.headings[2:] == ["Summary", "CuTe kernels", "Metadata"]
    assert page.all("svg") == []


def test_results_that_are_not_finite(found: report.Report) -> None:
    nan = report.Quantiles(*[float("inf")] * 5)
    spoilt = dataclasses.replace(found.rows[0], error=float("inf"), used=float("inf"), verdict="broken", row_errors=nan)
    page = Page(report_html.to_html(dataclasses.replace(found, rows=[spoilt, *found.rows[1:]])))
    assert len(page.all("svg")) == 4 * len(inputs.OPS) + 2


def browse(page: Path, profile: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", *arguments, page.as_uri()]
    # a home of its own: chromium writes there too
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment)
    return done.stdout


@needs_browser
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1280, 2)])
def test_in_a_browser(width: int, columns: int, found: report.Report, tmp_path: Path) -> None:
    # in a frame of that width: a window of chromium's has at least 500 pixels
    text = html.escape(report_html.to_html(found))
    probe = """<script>addEventListener("load", () => {
      const frame = document.querySelector("iframe").contentWindow, page = frame.document;
      const all = (what, of) => [...page.querySelectorAll(what)].map(of);
      const seen = {inner: frame.innerWidth, scroll: page.documentElement.scrollWidth};
      seen.tables = all("table", t => [t.getBoundingClientRect().height, t.rows.length]);
      seen.regions = all(".scroll", r => r.getBoundingClientRect().right);
      seen.figures = all("figure svg", s => s.getBoundingClientRect().toJSON());
      seen.marks = all("figure svg use", m => m).length;
      seen.open = all("details[open]", d => d).length;
      seen.grid = frame.getComputedStyle(page.querySelector(".figures")).gridTemplateColumns.split(" ").length;
      document.body.setAttribute("data-seen", JSON.stringify(seen));
    })</script>"""
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{text}"></iframe>'
    file = tmp_path / "probe.html"
    file.write_text(
        f'<!doctype html><html><head><meta charset="utf-8"></head><body>{frame}{probe}</body></html>', encoding="utf-8"
    )
    dom = browse(file, tmp_path / "profile", "--window-size=1400,1000", "--dump-dom")
    (seen_text,) = [attributes["data-seen"] for attributes in Page(dom).all("body")]
    seen = json.loads(str(seen_text))
    assert seen["inner"] == width
    assert seen["scroll"] == width, "the page scrolls sideways"
    assert all(right <= width for right in seen["regions"])
    assert len(seen["tables"]) == len(seen["regions"]) > 20
    assert all(height > 30 and rows > 1 for height, rows in seen["tables"])
    assert seen["open"] == 0
    assert len(seen["figures"]) == 4 * len(inputs.OPS) + 2
    assert all(box["width"] > 250 and box["height"] > 90 and box["right"] <= width for box in seen["figures"])
    assert seen["marks"] > 300
    assert seen["grid"] == columns


@needs_browser
def test_a_screenshot_is_not_blank(found: report.Report, tmp_path: Path) -> None:
    from matplotlib import image

    (tmp_path / "report.html").write_text(report_html.to_html(found), encoding="utf-8")
    picture = tmp_path / "phone.png"
    browse(tmp_path / "report.html", tmp_path / "profile", "--window-size=390,3000", f"--screenshot={picture}")
    pixels = image.imread(picture)[..., :3]
    assert pixels.shape[1] == 390
    # every colour of the backends is somewhere in the pictures
    for colour in ((0x24, 0x63, 0xB0), (0xC2, 0x57, 0x0C), (0x0B, 0x7D, 0x5B)):
        assert (abs(pixels * 255 - colour).max(-1) < 2).sum() > 20
