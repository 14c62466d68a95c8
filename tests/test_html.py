"""The report as HTML, JSON and SVG: what it shows, in a browser; what it escapes; how large it gets."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn
from tttc.codegen.schedule import Schedule

import tttc

SCREENSHOTS = Path(__file__).parents[1] / "build" / "report"
SCHEMA = Path(tttc.__file__).parent / "report" / "schema.json"
EVIL = "<script>alert(1)</script>"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


class Two(nn.Module):
    """A TTT-Linear under a name that is a script, and a TTT-MLP."""

    def __init__(self):
        super().__init__()
        self.add_module(EVIL, tttc.nn.TTTLinear(16, 2, mini_batch_size=4))
        self.second = tttc.nn.TTTMLP(16, 2, mini_batch_size=4)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def evil_step(anchor, W, token, shared):
    # </pre><script>document.title = "owned"</script><img src="https://example.com/x.png">
    key = "</code><script>alert(2)</script>"
    W = W - 0.1 * torch.outer(token[key], token[key] @ anchor - token["v & <b>"])
    return W, token[key] @ W


def evil(x):
    tokens = {"</code><script>alert(2)</script>": x, "v & <b>": x}
    return tttc.scan(evil_step, torch.zeros(2, 4, 4), tokens, mini_batch_size=4)[1]


def online_step(anchor, W, token, shared):
    W = W + torch.outer(token, torch.tanh(token @ W))
    return W, token @ W


def online(x):
    return tttc.scan(online_step, torch.zeros(2, 4, 4), x, mini_batch_size=4)[1]


@pytest.fixture(scope="module")
def explained():
    torch.manual_seed(0)
    return tttc.explain(Two(), torch.randn(2, 10, 16), backend="torch", target="sm_90")


@pytest.fixture(scope="module")
def scripted():
    torch.manual_seed(0)
    return tttc.explain(evil, torch.randn(1, 2, 6, 4), backend="torch", target="")


# -- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs Chromium: apt-get install -y chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def visit(browser, path: Path, width: int, dark: bool = False) -> None:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("performance"), browser.get_log("browser")  # those of other pages
    browser.get(path.as_uri())


def requested(browser) -> list[str]:
    """The addresses asked for since the last call."""
    messages = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [x["request"]["url"] for x in sent]


def wide(browser) -> tuple[int, int]:
    script = "let e = document.scrollingElement; return [e.scrollWidth, e.clientWidth]"
    return tuple(browser.execute_script(script))


def test_a_browser_shows_every_stage_and_asks_for_nothing(explained, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / "report.html"
    explained.to_html(path)
    visit(browser, path, 1440)
    for name in explained.stages:
        if name.startswith("scan"):
            assert browser.find_elements(By.CSS_SELECTOR, f"details[data-stage='{name}'] svg"), name
    # A graph is expanded by keyboard, and drawn with the nodes it has.
    closed = browser.find_element(By.CSS_SELECTOR, "details[data-stage='scan1.batch']")
    drawn = closed.find_element(By.TAG_NAME, "svg")
    assert not drawn.is_displayed()
    closed.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert closed.get_attribute("open") and drawn.is_displayed() and drawn.size["height"] > 500
    assert "sum over" in drawn.text and "token.k" in drawn.text
    assert len(drawn.find_elements(By.CSS_SELECTOR, "g.changed")) > 10
    assert EVIL in browser.find_element(By.TAG_NAME, "main").text
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for width, dark in ((1440, False), (390, True)):
        visit(browser, path, width, dark)
        browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
        scrolled, seen = wide(browser)
        assert scrolled <= seen, f"{scrolled} pixels in a window of {seen}"
        browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = false)")
        shot = SCREENSHOTS / f"report-{width}.png"
        assert browser.save_screenshot(str(shot)) and shot.stat().st_size > 10_000
        assert browser.execute_script("return document.scrollingElement.scrollTop") == 0
    assert {url.partition("/report.html")[0] for url in requested(browser)} == {tmp_path.as_uri()}
    assert browser.get_log("browser") == []


def test_a_script_in_names_and_source_is_shown_and_not_run(scripted, browser, tmp_path):
    from selenium.webdriver.common.by import By

    path = tmp_path / "report.html"
    scripted.to_html(path)
    visit(browser, path, 1440)
    browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
    shown = browser.find_element(By.TAG_NAME, "main").text
    assert '# </pre><script>document.title = "owned"</script>' in shown
    assert "token['</code><script>alert(2)</script>']" in shown.replace("\u2026", "")
    assert browser.title == "What tttc did to evil"
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    assert browser.get_log("browser") == []
    assert all(url.startswith("file:") for url in requested(browser))


def test_it_can_be_used_by_keyboard_and_screen_reader(explained, browser, tmp_path):
    path = tmp_path / "report.html"
    explained.to_html(path)
    visit(browser, path, 390)
    found = browser.execute_script(
        """
        let all = s => [...document.querySelectorAll(s)], levels = all('h1,h2,h3,h4').map(h => +h.tagName[1]);
        document.body.focus();
        return {
            landmarks: ['header', 'nav', 'main', 'footer'].map(s => all(s).length),
            unnamed: all('svg').filter(s => !s.querySelector('title') || !s.querySelector('desc')
                || s.getAttribute('aria-labelledby').split(' ').some(i => !document.getElementById(i))).length,
            headless: all('table').filter(t => !t.caption || !t.querySelector('th[scope=col]')
                || !t.querySelector('th[scope=row]')).length,
            skipped: levels.filter((l, i) => i && l > levels[i - 1] + 1).length,
            twice: all('[id]').length - new Set(all('[id]').map(e => e.id)).size,
            astray: all('a[href^="#"]').filter(a => !document.getElementById(a.hash.slice(1))).length,
            unreachable: all('.scroll, .graph, .code').filter(
                e => e.tabIndex != 0 || e.getAttribute('role') != 'region' || !e.ariaLabel).length,
            language: document.documentElement.lang, skip: all('a')[0].hash,
        }
        """
    )
    assert found.pop("landmarks") == [1, 1, 1, 1]
    assert found.pop("language") == "en" and found.pop("skip") == "#main"
    assert found == dict.fromkeys(found, 0)


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(scripted, browser, tmp_path):
    from selenium.webdriver.common.by import By

    shown = scripted._repr_html_()
    assert shown.startswith("<iframe") and "<script" not in shown and '"https' not in shown
    path = tmp_path / "report.html"
    path.write_text("<!DOCTYPE html><title>notebook</title><h1>cell</h1>" + shown)
    visit(browser, path, 1000)
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    try:
        assert browser.find_element(By.TAG_NAME, "h1").text == "What tttc did to evil"
        summary = browser.find_element(By.CSS_SELECTOR, "details:not([open]) > summary")
        summary.click()
        assert summary.find_element(By.XPATH, "..").get_attribute("open")
    finally:
        browser.switch_to.default_content()
    assert browser.find_element(By.TAG_NAME, "h1").text == "cell"
    assert browser.get_log("browser") == []
    assert all(url.startswith(("file:", "about:")) for url in requested(browser))


# What is to be seen: text that stands out from its ground, labels inside their boxes and clear of each other.
SIGHT = """
let rgb = s => (s.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
let light = c => { let [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
let ratio = (a, b) => { let [x, y] = [light(a), light(b)]; return (Math.max(x, y) + .05) / (Math.min(x, y) + .05) };
let ground = e => { for (; e; e = e.parentElement) { let c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c } return [255, 255, 255] };
let all = s => [...document.querySelectorAll(s)], style = (e, k) => rgb(getComputedStyle(e)[k]);
let meet = (x, y, d) => x.x < y.x + y.width - d && y.x < x.x + x.width - d
    && x.y < y.y + y.height - d && y.y < x.y + x.height - d;
all('details').forEach(x => x.open = true);
let faint = all('main *, header *, nav *, footer *').filter(e => !e.closest('svg')
    && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) && ratio(style(e, 'color'), ground(e)) < 4.5);
let dim = all('svg .n tspan').filter(t => ratio(style(t, 'fill'), style(t.closest('.n').querySelector('rect'), 'fill')) < 4.5);
let outside = all('svg .n').filter(n => { let t = n.querySelector('text').getBBox(), q = n.querySelector('rect').getBBox();
    return t.x < q.x - 1 || t.x + t.width > q.x + q.width + 1 || t.y + t.height > q.y + q.height + 2 });
let touching = [];
for (let s of all('svg')) for (let kind of ['.fig > text', '.n > rect']) {
    let boxes = [...s.querySelectorAll(kind)].map(e => [e.parentElement.textContent.length < 99
        ? e.parentElement.textContent : e.textContent, e.getBBox()]);
    boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => meet(x, y, 1) && touching.push([a, b])));
}
return [faint.map(e => [e.className, e.textContent.slice(0, 40), getComputedStyle(e).color]),
    dim.map(e => e.textContent), outside.map(e => e.textContent), touching, all('svg .n').length];
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_and_nothing_overlaps(explained, browser, tmp_path, dark):
    path = tmp_path / "report.html"
    explained.to_html(path)
    visit(browser, path, 1440, dark)
    *wrong, drawn = browser.execute_script(SIGHT)
    assert wrong == [[], [], [], []] and drawn > 500


def test_focus_is_seen_from_the_first_key(explained, browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / "report.html"
    explained.to_html(path)
    visit(browser, path, 390)
    seen = []
    for _ in range(12):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        seen.append(
            browser.execute_script(
                "let e = document.activeElement, s = getComputedStyle(e), b = e.getBoundingClientRect();"
                "return [e.textContent.trim().slice(0, 20), s.outlineStyle, parseFloat(s.outlineWidth), b.left >= 0]"
            )
        )
    assert seen[0][0] == "Skip to the report"
    assert all(style == "solid" and width >= 2 and inside for _, style, width, inside in seen)


def test_the_picture_of_the_readme_keeps_its_text_in_its_boxes(browser):
    visit(browser, Path(__file__).parents[1] / "docs" / "pipeline.svg", 1440)
    outside = browser.execute_script(
        """
        return [...document.querySelectorAll('g')].flatMap(g => {
            let box = g.querySelector('rect').getBBox();
            return [...g.querySelectorAll('text')].filter(t => { let b = t.getBBox();
                return b.x < box.x || b.x + b.width > box.x + box.width - 2 || b.y + b.height > box.y + box.height
            }).map(t => t.textContent) })
        """
    )
    assert outside == []


# How colours look to those whose red (protanopia) or green (deuteranopia) cones are missing: rows of matrices on
# linear light. Source: Machado, Oliveira, Fernandes: A physiologically-based model for simulation of color vision
# deficiency (IEEE TVCG 15, 2009), at full severity.
SIGHTS = {
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "no green": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}


def lightness_and_colour(hexadecimal: str, sight) -> list[float]:
    """Coordinates in CIELAB, in which distance is what is seen."""
    channels = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    r, g, b = (
        min(max(sum(m * c for m, c in zip(row, linear, strict=True)), 0), 1) for row in sight
    )
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_kinds_of_nodes_are_told_apart_without_red_or_green(sight, dark):
    css = (Path(tttc.__file__).parent / "report" / "templates" / "report.css").read_text()
    colours = css[css.index("prefers-color-scheme:dark") :] if dark else css
    boxes, pills = ("contraction", "elementwise", "reduction"), ("state", "token", "parameter")
    for group in (boxes, pills):  # boxes and pills differ in shape
        seen = {
            k: lightness_and_colour(
                re.search(rf"--{k}:(#\w{{6}})", colours)[1],
                SIGHTS[sight],
            )
            for k in group
        }
        for a in group:
            for b in group:
                apart = sum((x - y) ** 2 for x, y in zip(seen[a], seen[b], strict=True)) ** 0.5
                assert a == b or apart > 9, (a, b, apart)


# -- without one ------------------------------------------------------------------------------------------


def test_the_page_says_what_was_done(explained, tmp_path):
    page = explained.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page
    assert EVIL not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    scan = explained.scans[0]
    kernel = scan.kernels[0]
    schedule = kernel.config["schedule"]
    assert schedule.reasons
    for part in (
        "default-src 'none'",
        "One token of TTT-Linear",  # the step's docstring
        scan.orders[0].chosen.written,
        dict(schedule.reasons)["num_warps"],
        f'<dd class="is">{kernel.resources["registers"]}</dd>',
        "H100 SXM",
        "one mini-batch after another",
    ):
        assert part in page, part


def test_scans_without_dual_form_and_models_without_scans(tmp_path):
    sequential = tttc.explain(online, torch.randn(1, 2, 6, 4), backend="torch", target="")
    (scan,) = sequential.scans
    page = sequential.to_html()
    assert "Sequential." in page and scan.reason.split(":")[0] in page
    assert scan.recurrence.unit == "token" and "one token after another" in page
    nothing = tttc.explain(nn.Linear(3, 3), torch.randn(2, 3), backend="torch").to_html()
    assert "No <code>tttc.scan</code> was met" in nothing
    factor = torch.tensor(2.0)

    def closes_over(x):
        return tttc.scan(lambda a, W, t, s: (W + t * factor, W), torch.zeros(2, 4), x)[1]

    with pytest.warns(tttc.TTTCWarning):
        eager = tttc.explain(closes_over, torch.randn(1, 2, 3, 4), backend="torch", target="")
    assert "Eager." in eager.to_html()
    for found in (sequential, eager):
        jsonschema.validate(found.to_dict(), json.loads(SCHEMA.read_text()))


def test_json_is_as_its_schema_says(explained, tmp_path):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    text = explained.to_json(tmp_path / "r.json")
    data = json.loads(text)
    jsonschema.validate(data, schema)
    kernels = {(k["scan"], k["direction"]) for k in data["kernels"]}
    assert {(s, d) for s in ("scan0", "scan1") for d in ("forward", "backward")} <= kernels
    assert all(
        s["backward"]["errors"] and s["backward"]["recurrence"]["reverse"] for s in data["scans"]
    )
    assert data == explained.to_dict() == json.loads((tmp_path / "r.json").read_text())


def test_json_of_the_same_model_is_the_same(scripted):
    torch.manual_seed(0)
    again = tttc.explain(evil, torch.randn(1, 2, 6, 4), backend="torch", target="")
    assert again.to_json() == scripted.to_json()


def test_pictures_are_svg_of_their_own(explained, tmp_path):
    for what in (
        "scan0.dualise",
        "scan1.recurrence",
        "scan1.backward",
        "scan0.backward_recurrence",
        "scan0.roofline",
        "scan0.errors",
        "model.fused",
    ):
        text = explained.to_svg(what, tmp_path / "p.svg")
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert (tmp_path / "p.svg").read_text(encoding="utf-8") == text
    with pytest.raises(KeyError, match=r"what: expected one of scan0\.capture"):
        explained.to_svg("dualise")


def test_a_timed_scan_says_on_what():
    found = tttc.explain(online, torch.randn(1, 2, 6, 4), backend="torch", target="", timed=True)
    (scan,) = found.scans
    assert scan.seconds > 0 and scan.timed_on == "cpu"
    assert "on cpu" in found.to_html()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(2, 8, 8))

    def forward(self, x):
        return (
            x
            + tttc.scan(
                evil_step,
                self.W,
                dict.fromkeys(("</code><script>alert(2)</script>", "v & <b>"), x),
                4,
            )[1]
        )


def test_equal_layers_are_shown_once():
    def size(layers):
        model = nn.Sequential(*(Layer() for _ in range(layers)))
        found = tttc.explain(model, torch.randn(1, 2, 8, 8), backend="torch", target="")
        assert len(found.layers) == layers and len(found.scans) == 1
        return len(found.to_html().encode())

    few, many = size(2), size(24)
    assert many < 5_000_000
    assert many < few + 22 * 1000


def test_a_schedule_has_a_reason_for_what_it_chose(explained):
    for kernel in explained.kernels:
        schedule = kernel.config["schedule"]
        chosen = {k for k, v in schedule.choices().items() if v != getattr(Schedule(), k)}
        reasons = dict(schedule.reasons)
        assert chosen <= set(reasons) <= set(schedule.choices())
        assert replace(schedule, reasons=()) == schedule and "reasons" not in repr(schedule)
