"""The report's page as a browser shows it: no error, no overlap, keyboard, axe, hostile strings.

Needs playwright and the system's Chromium (Debian: `apt install chromium`); skipped without.
axe-core is fetched by npm where it is not at `EUTECTIC_AXE`, and its test skipped without.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

import eutectic
from helpers.folders import make_base, make_expert
from helpers.merging import save_inputs
from helpers.reports import curve, hostile_sources, results, routed

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

AXE = "axe-core@4.14.1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SIZES = {
    "desk": {"viewport": {"width": 1440, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
}


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page with every section, of twelve models on eight tasks."""
    folder = tmp_path_factory.mktemp("page")
    tasks = [f"task_{i}" for i in range(8)]
    models = {f"model_{j}": {t: 0.5 + 0.02 * j for t in tasks} for j in range(12)}
    paired = [(f"model_{j}", "model_11", -0.03 * (11 - j), 0.04) for j in range(11)]
    told = results(
        models, dict.fromkeys(tasks, 0.8), dict.fromkeys(tasks, 0.45), differences=paired
    )
    base = make_base(layers=6)
    experts = {n: make_expert(base, i) for i, n in enumerate("abc", start=1)}
    inputs = save_inputs(folder, base, experts)
    eutectic.merge(**inputs, method="iso_c", output=folder / "merged")
    found = eutectic.inspect(**inputs, merged={"iso_c": folder / "merged"})
    router = folder / "router"
    router.mkdir()
    (router / "routed.json").write_text(json.dumps(routed(["a", "b", "c"])))
    plan = eutectic.plan(**inputs, method="ties")
    tried = curve({0.1: 0.2, 0.3: 0.7, 0.5: 0.8, 1.0: 0.75, 3.0: 0.1}, 0.5)
    target = folder / "report.html"
    eutectic.report(told, found, tried, plan, folder / "merged", router, output=target)
    return target


@pytest.fixture
def opened(browser):
    """Open a page, and return it with what its console said."""
    contexts = []

    def open_page(path: Path, size: str = "desk", **more):
        context = browser.new_context(**SIZES[size], **more)
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.extend(
            [request.url] if not request.url.startswith(("file:", "data:")) else []))  # fmt: skip
        page.goto(path.as_uri())
        return page, said

    yield open_page
    for context in contexts:
        context.close()


# Text of two elements that lie over each other, neither within the other.
_OVERLAPS = """() => {
  const shown = [...document.querySelectorAll(
    "h1, h2, h3, p, li, dt, dd, button, select, input, figure, .wide, summary, label, nav a")]
    .filter((e) => e.offsetParent !== null && !e.closest(".skip, .wide *"));
  const boxes = shown.map((e) => [e, e.getBoundingClientRect()]).filter(([, b]) => b.width);
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [e, a] = boxes[i], [f, b] = boxes[j];
    if (e.contains(f) || f.contains(e)) continue;
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 2 && down > 2) found.push([e, f].map((x) => x.outerHTML.slice(0, 90)).join(" | "));
  }
  return found;
}"""
# Labels of a chart that lie over each other.
_LABELS = """() => {
  const found = [];
  for (const chart of document.querySelectorAll("svg.chart")) {
    if (!chart.getBoundingClientRect().width) continue;
    const boxes = [...chart.querySelectorAll("text")].map((t) => [t, t.getBoundingClientRect()]);
    const whole = chart.getBoundingClientRect();
    boxes.forEach(([t, a], i) => {
      if (a.left < whole.left - 1 || a.right > whole.right + 1) found.push("cut: " + t.textContent);
      for (const [u, b] of boxes.slice(i + 1)) {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1 && down > 3) found.push(t.textContent + " | " + u.textContent);
      }
    });
  }
  return found;
}"""


@pytest.mark.parametrize("size", SIZES)
def test_nothing_overlaps_and_nothing_is_cut(opened, page_file, size):
    page, said = opened(page_file, size)
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate(_OVERLAPS) == []
    assert page.evaluate(_LABELS) == []
    assert said == []


def test_dark_is_dark_and_the_reader_may_choose(opened, page_file):
    page, _ = opened(page_file, "dark")

    def paper() -> int:
        found = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(found.removeprefix("rgb(").split(",")[0])

    assert paper() < 60
    page.select_option("#theme", "light")
    assert paper() == 255
    page.select_option("#theme", "dark")
    assert paper() < 60


def test_the_keyboard_reaches_and_works_everything(opened, page_file):
    page, said = opened(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(400):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(
            "((e) => e.id || e.dataset.chooses || e.textContent.slice(0, 40))"
            "(document.activeElement)"))  # fmt: skip
    for control in page.evaluate(
        "[...document.querySelectorAll('button, select, input, summary')]"
        ".filter((e) => e.checkVisibility())"
        ".map((e) => e.id || e.dataset.chooses || e.textContent.slice(0, 40))"
    ):
        assert control in reached, control
    # Sorting, from a button in a column's head.
    head = page.locator("#models table.scores button.sort").first
    head.focus()
    page.keyboard.press("Enter")
    names = page.locator("#models table.scores").first.locator("tbody th").all_text_contents()
    assert [n.split()[0] for n in names[:3]] == ["base", "experts", "model_0"]
    # Choosing a model and a measure.
    chooser = page.locator("select[data-chooses$='-tasks']").first
    chooser.focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#models .panel.chosen").first.get_attribute("id") == "s0m1"
    # Searching tensors.
    page.locator("#tensor-search").focus()
    page.keyboard.type("LAYERS.3 proj.weight")
    shown = page.locator("#tensor-table tbody tr:visible")
    assert shown.count() == 2  # of the merge and of the plan
    assert page.locator("#tensor-count").text_content().startswith("2 of ")
    # Spectra of the next layer.
    before = page.locator("#spectra path.spectrum").first.get_attribute("d")
    page.locator("#spectra-after").focus()
    page.keyboard.press("Enter")
    assert page.locator("#spectra path.spectrum").first.get_attribute("d") != before
    assert page.locator("#spectra-layer").input_value() == "1"
    # Copying a recipe says what it did.
    page.locator("button[data-copies]").first.focus()
    page.keyboard.press("Enter")
    # Waiting for a function of the page would need eval, which its policy forbids.
    page.locator("[role=status]", has_text=re.compile("Copied|Selected")).first.wait_for()
    assert said == []


def test_paper_shows_what_is_folded_and_no_controls(opened, page_file, tmp_path):
    page, said = opened(page_file, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden() and page.locator("#tensor-filters").is_hidden()
    page.set_viewport_size({"width": 700, "height": 990})  # A4 without its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    page.set_viewport_size({"width": 1440, "height": 900})
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    printed = page.pdf(path=tmp_path / "page.pdf", format="A4", print_background=True)
    assert printed.startswith(b"%PDF") and said == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The script of axe-core, from a folder or from npm."""
    given = os.environ.get("EUTECTIC_AXE")
    folder = tmp_path_factory.mktemp("axe")
    if given is None:
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("axe-core: neither EUTECTIC_AXE nor npm is there")
        words = [npm, "pack", AXE, "--silent", "--fetch-retries=0"]
        try:
            done = subprocess.run(words, cwd=folder, capture_output=True, timeout=30).returncode
        except subprocess.TimeoutExpired:
            done = 1
        if done:
            pytest.skip("axe-core cannot be fetched")
        given = str(next(folder.glob("*.tgz")))
    with tarfile.open(given) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


# Contrast takes most of the time, and does not differ between a desk and a phone.
RULES = {
    "desk": {},
    "phone": {"rules": {"color-contrast": {"enabled": False}}},
    "dark": {"runOnly": ["color-contrast"]},
}


@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_serious(opened, page_file, axe, size):
    page, _ = opened(page_file, size, bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.evaluate(axe)
    asked = {"resultTypes": ["violations"], **RULES[size]}
    found = page.evaluate("(asked) => axe.run(document, asked)", asked)
    told = [
        (v["id"], v["impact"], [n["html"][:160] for n in v["nodes"][:3]])
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert told == []


def test_hostile_strings_stay_texts(opened, tmp_path):
    target = tmp_path / "hostile.html"
    report = eutectic.report(*hostile_sources(tmp_path), output=target)
    page, said = opened(target)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    for select in page.locator("select:visible").all():
        options = select.locator("option").count()
        for index in range(min(options, 12)):
            select.select_option(index=index)
    page.wait_for_timeout(50)
    assert page.evaluate("window.ran") is None
    assert page.locator("img, iframe, object, embed, main script").count() == 0
    assert said == []
    # They are there, as texts.
    names = page.locator("#models table.scores").first.locator("tbody th").all_text_contents()
    assert any("<script>window.ran=1</script> 0" in name for name in names)
    assert report.title
