"""The report's page in a real browser: its console is empty, the interactions work, and it fits a phone.

Needs Chromium, its driver and selenium: ``tox -e browser``. Where they are missing these tests are skipped, and the
test report says so.
"""

from __future__ import annotations

import math
import pathlib
import re
import shutil

import pytest

from fxpipe.ir.plan import Baseline, PipelinePlan, StagePlan, TieGroup
from fxpipe.ir.tensor import TensorMeta
from fxpipe.planning.explain import explain
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.report.page import render_page

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def large_plan() -> PipelinePlan:
    """Sixteen stages, sixty-four microbatches: what the page must stay light for."""
    sent = (TensorMeta((1, 4096, 4096), "bfloat16", requires_grad=True),)
    stages = tuple(
        StagePlan(
            index, index, tuple(f"model.layers.{index * 5 + i}" for i in range(5)), 10**9, 2 * 10**9,
            0.05 + 0.002 * (index % 3), 0.016, 0.033, 0.01, 0.001, 60 * 2**30, 4 * 10**9, 4 * 10**9, 2**30,
            16 - index, sent if index < 15 else (), recompute=("model.layers.0",) if index == 0 else (),
        )
        for index in range(16)
    )  # fmt: skip
    return PipelinePlan(
        "<Llama & Co>", "0", stages, (TieGroup("a", ("a", "b"), (0, 15), 1 << 30, 2e-3),), 16,
        num_microbatches=64, microbatch_size=1, bottleneck=0.054, lower_bound=0.053, method="all cuts",
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    plan = large_plan()
    path = tmp_path_factory.mktemp("page") / "plan.html"
    rows = (Baseline("Megatron", "", 0.06, 1.2, 61 << 30), Baseline("torchgpipe", "", remark="no such cut"))
    done = simulate(plan)
    helping = [("fxpipe plan model.py:build --stages 16 --schedule InterleavedZeroBubble", "3.0 % faster")]
    path.write_text(render_page(plan, rows, done, explain(plan, done), helping), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or binary is None:
        pytest.skip("no Chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser, page):
    browser.set_window_size(1280, 900)
    browser.get(page.as_uri())
    return browser


def emulate(browser, **features: str) -> None:
    wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})


PAINTED = """
const done = arguments[0];
new PerformanceObserver((list) => {
  const entry = list.getEntriesByName("first-contentful-paint")[0];
  if (entry) done(entry.startTime);
}).observe({ type: "paint", buffered: true });
"""


def test_the_page_is_light_and_paints_at_once(opened, page):
    assert page.stat().st_size < 2_000_000
    painted = opened.execute_async_script(PAINTED)
    assert painted < 1000


def test_the_console_is_empty_and_nothing_is_fetched(opened):
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_first_screen_answers_the_four_questions(opened):
    cards = opened.find_elements("css selector", ".card")
    assert [card.find_element("css selector", "h2").text for card in cards] == [
        "Does it fit?", "How fast?", "What limits it?", "What would help?",
    ]  # fmt: skip
    bottoms = opened.execute_script(
        "return [...document.querySelectorAll('.card')].map(card => card.getBoundingClientRect().bottom)"
    )
    assert max(bottoms) < 900
    assert cards[0].find_element("css selector", ".big").text == "Yes"
    assert cards[3].find_element("css selector", ".big").text == "3.0 % faster"
    assert "--schedule InterleavedZeroBubble" in cards[3].text


def test_a_stage_opens_to_its_layers_by_mouse_and_keyboard(opened):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    stages = opened.find_elements("css selector", ".bar button")
    assert len(stages) == 16
    stages[3].click()
    panel = opened.find_element("id", "layers")
    assert "Stage 3 on rank 3" in panel.text
    assert "model.layers.15" in panel.text
    stages[3].send_keys(keys.ARROW_RIGHT)
    assert "Stage 4 on rank 4" in panel.text
    assert opened.switch_to.active_element == stages[4]
    stages[4].send_keys(keys.HOME)
    assert "Recomputed:" in panel.text


def test_the_time_line_zooms_and_tells_what_is_pointed_at(opened):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    box = opened.find_element("id", "timeline")
    wide = "return document.getElementById('timeline').scrollWidth"
    before = opened.execute_script(wide)
    opened.find_element("id", "in").click()
    assert opened.execute_script(wide) > 1.7 * before
    opened.find_element("id", "all").click()
    assert opened.execute_script(wide) <= before + 1
    box.send_keys("+")
    assert opened.execute_script(wide) > 1.7 * before
    box.send_keys(keys.ENTER)
    pointed = opened.find_element("id", "pointed")
    assert re.match(r"rank 0, stage 0, forward of microbatch 0: 0\.000 .* to ", pointed.text)
    box.send_keys(keys.ENTER)
    assert "forward of microbatch 1" in pointed.text


def test_a_phone_needs_no_scrolling_to_the_side(opened):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 400
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRASTS = """
const channel = (value) => value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
const found = [];
for (const node of document.querySelectorAll("main *")) {
  if (![...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
  let behind = node, colour = [0, 0, 0, 0];
  while (behind && (colour[3] ?? 1) === 0) {
    colour = rgba(getComputedStyle(behind).backgroundColor);
    behind = behind.parentElement;
  }
  const [a, b] = [light(rgba(getComputedStyle(node).color)), light(colour)];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.trim().slice(0, 40)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(opened, scheme):
    emulate(opened, prefers_color_scheme=scheme)
    try:
        least, text = min(opened.execute_script(CONTRASTS))
        assert math.isfinite(least)
        assert least >= 4.5, text
    finally:
        emulate(opened)


def test_everything_that_can_be_used_is_reached_by_keyboard(opened):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    reached = []
    body = opened.find_element("tag name", "body")
    body.send_keys(keys.TAB)
    for _ in range(12):
        active = opened.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("aria-label") or active.tag_name)
        active.send_keys(keys.TAB)
    assert {"layers", "in", "out", "all", "timeline"} <= set(reached)
