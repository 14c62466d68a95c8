"""The report as HTML, JSON and SVG: what it shows, in a browser; what it escapes; how large it gets."""

from __future__ import annotations

import json
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
from tttc.ir.order import Order, best_path
from tttc.report import figures
from tttc.report.changes import compare
from tttc.report.layout import layered
from tttc.report.records import GraphReport, NodeReport, Roofline

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


def test_a_notebook_shows_the_page_in_a_frame(scripted):
    shown = scripted._repr_html_()
    assert shown.startswith("<iframe") and "sandbox" in shown
    assert "<script" not in shown and '"https' not in shown


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
    assert data == explained.to_dict() == json.loads((tmp_path / "r.json").read_text())


def test_json_of_the_same_model_is_the_same(scripted):
    torch.manual_seed(0)
    again = tttc.explain(evil, torch.randn(1, 2, 6, 4), backend="torch", target="")
    assert again.to_json() == scripted.to_json()


def test_pictures_are_svg_of_their_own(explained, tmp_path):
    for what in (
        "scan0.dualise",
        "scan1.recurrence",
        "scan0.roofline",
        "scan0.errors",
        "model.fused",
    ):
        text = explained.to_svg(what, tmp_path / "p.svg")
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert (tmp_path / "p.svg").read_text(encoding="utf-8") == text
    with pytest.raises(KeyError, match=r"what: expected one of scan0\.capture"):
        explained.to_svg("dualise")


def test_a_timed_scan_lies_under_the_roof():
    roof = Roofline("H100 SXM", 1e15, "bf16", 4e12, 0.2, 50.0, 3e13)
    assert roof.attainable(0.2) == 0.8e12 and roof.attainable(1000.0) == 1e15
    drawn = str(figures.roofline(roof, "scan0"))
    assert drawn.count("p-measured") == 1 and "measured: 30 TFLOP/s" in drawn
    assert "p-measured" not in str(figures.roofline(replace(roof, measured=None), "scan0"))
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


# -- orders, schedules ------------------------------------------------------------------------------------


def test_rejected_orders_and_what_they_would_make():
    # z_tj = sum_su m_ts q_tu k_su g_sj: the dual order, and the primal one that makes k_su g_sj first.
    operands = (("m", ("t", "s")), ("q", ("t", "u")), ("k", ("s", "u")), ("g", ("s", "j")))
    sizes = {"t": 16, "s": 16, "u": 32, "j": 32}
    labels = [o[1] for o in operands]
    path, info = best_path(labels, ("t", "j"), sizes)
    order = Order(operands, ("t", "j"), tuple(sizes.items()), tuple(path), int(info.opt_cost), 0)
    assert order.written() == "g · (m · (q · k))"
    assert order.operations == 2 * 16 * 16 * 32 + 16 * 16 + 2 * 16 * 16 * 32
    assert order.largest() == (16 * 32, ("j", "t"))
    rejected = {order.written(p): (n, order.largest(p)) for p, n in order.alternatives()}
    assert len(rejected) == 5 and min(n for n, _ in rejected.values()) >= order.operations
    primal = 16 * 32 * 32 + 16 * 16 * 32 + 2 * 16 * 16 * 32 * 32
    assert rejected["(k · g) · (m · q)"] == (primal, (16 * 32 * 32, ("s", "u", "j")))


def test_a_schedule_has_a_reason_for_what_it_chose(explained):
    for kernel in explained.kernels:
        schedule = kernel.config["schedule"]
        chosen = {k for k, v in schedule.choices().items() if v != getattr(Schedule(), k)}
        reasons = dict(schedule.reasons)
        assert chosen <= set(reasons) <= set(schedule.choices())
        assert replace(schedule, reasons=()) == schedule and "reasons" not in repr(schedule)


# -- how graphs are compared and laid out ---------------------------------------------------------------


def nodes(*rows):
    return GraphReport([NodeReport(n, k, o, d, (), tuple(i.split())) for n, k, o, d, i in rows])


def test_what_a_pass_changed():
    x = ("x", "token", "x", "", "")
    before = nodes(
        x, ("a", "elementwise", "exp", "t → t", "x"), ("b", "elementwise", "neg", "t → t", "a")
    )
    after = nodes(
        x,
        ("p", "elementwise", "exp", "t → t", "x"),
        ("q", "contraction", "sum over s", "t s → t", "p"),
        ("r", "elementwise", "neg", "s t → s t", "q"),
    )
    found = compare(before, after, "before")
    assert [n.change for n in found.nodes] == ["", "", "new", "changed"]
    assert compare(after, before, "after").removed == ["sum over s, t s → t"]
    same = compare(after, after, "itself")
    assert not same.removed and {n.change for n in same.nodes} == {""}


def test_layout_keeps_edges_down_and_nodes_apart():
    names = [f"n{i}" for i in range(30)]
    edges = [
        (names[i], names[j])
        for i in range(30)
        for j in range(i + 1, 30)
        if (i * 7 + j * 3) % 11 == 0
    ]
    sizes = {n: (40.0 + 3 * (i % 7), 20.0) for i, n in enumerate(names)}
    made = layered(sizes, edges)
    for a, b in edges:
        assert made.centre[a][1] < made.centre[b][1]
        ys = [y for _, y in made.edges[a, b]]
        assert ys == sorted(ys)
    for a in names:
        for b in names:
            (xa, ya), (xb, yb) = made.centre[a], made.centre[b]
            apart = abs(xa - xb) >= (sizes[a][0] + sizes[b][0]) / 2 - 1e-6
            assert a == b or abs(ya - yb) >= 20 or apart
    assert all(0 <= x <= made.width for x, _ in made.centre.values())
