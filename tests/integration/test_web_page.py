"""The page of --serve in a real browser: Chromium without a screen, by its driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import require
from tests.web_batch import GIB, TOKEN, BatchServer, ServedBatch, another_process, made, served
from v2v_async.events import Bytes
from v2v_async.units import format_duration, format_size

WITHIN_S = 30.0
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "\"><script>document.title='taken'</script>",
    "a'b\"c&amp;d</td></tr>",
    "__proto__",
    "constructor",
    "\u202etxt.exe",
    "two\nlines",
    "\udcff",
    "x" * 300,
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A browser for the tests of this file."""
    require("chromium", "chromedriver")
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        *(["--no-sandbox"] if os.getuid() == 0 else []),  # it refuses to be root's with one
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as a person has it before them."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, batch: BatchServer) -> None:
        """Open the address that was printed, and wait until it lives."""
        self.driver.get(batch.url)
        self.until(lambda: self.text("#connection") == "Live")

    def until(self, check: Callable[[], object]) -> None:
        """Wait until ``check`` holds."""
        WebDriverWait(self.driver, WITHIN_S, poll_frequency=0.05).until(lambda _: check())

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Return what an element says, shown or not."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def names(self) -> list[str]:
        """Return the guests of the table from the top."""
        script = (
            "return [...document.querySelectorAll('#rows bdi')].map((each) => each.textContent)"
        )
        return list(self.run(script))

    def cells(self, name: str) -> dict[str, str]:
        """Return what a guest's row says, by column."""
        script = (
            "const row = [...document.querySelectorAll('#rows tr')].find("
            "  (each) => each.querySelector('bdi').textContent === arguments[0]);"
            "return Object.fromEntries("
            "  [...row.children].map((cell) => [cell.className.split(' ')[0], cell.innerText]))"
        )
        return dict(self.run(script, name))

    def choose(self, phase: str) -> None:
        """Press the button of a phase."""
        self.one(f'#phases button[data-phase="{phase}"]').click()

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.driver.get_log(kind)  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture
def page(chromium: webdriver.Chrome) -> Iterator[Page]:
    made = Page(chromium)
    made.log("performance")
    made.log("browser")
    yield made
    chromium.delete_all_cookies()
    chromium.get("about:blank")


@pytest.fixture
def batch() -> Iterator[ServedBatch]:
    with served() as made:
        yield made


def test_numbers_change_as_events_come(page: Page, batch: ServedBatch) -> None:
    a, b, c = batch.plan(["a", "b", "c"])
    page.open(batch)
    assert page.text("#name") == "move-it"
    assert page.driver.current_url == batch.origin + "/"  # without the token
    assert page.text("#done") == "0 of 3"
    assert page.text("#moved") == "0 B of 3.0 GiB"
    assert not page.one("#limits").is_displayed()
    assert not page.one("#failures").is_displayed()

    limits = {"taken": {"conversions": 1, "memory": 2 * GIB}}
    limits["capacities"] = {"conversions": 1, "memory": 8 * GIB, "groups.night.disks": 1 << 30}
    batch.emit("limits", details=limits)
    batch.emit("waiting", b, details={"for": "conversions", "until": None})
    batch.emit("started", a, details={"attempt": 1})
    batch.emit("started", a, step="convert")
    page.until(lambda: page.cells("a")["phase"] == "converting")
    page.until(lambda: page.cells("b")["activity"] == "waits for conversions")
    assert page.one("#limits").text.split("\n") == [
        *("Limits in use", "conversions", "1 of 1", "memory", "2.0 GiB of 8.0 GiB"),
        *("groups.night.disks", "0 of no limit"),
    ]
    # What grows with the time does so without an event.
    page.until(lambda: page.cells("a")["elapsed"] != "0:00")

    batch.emit("converted", a)
    batch.emit("started", a, step="copy")
    batch.copy(a, 0)
    batch.copy(a, 256 << 20)
    batch.emit("waiting", a, disk=2, details={"for": "disks", "until": None})
    page.until(lambda: page.text("#moved") == "256 MiB of 3.0 GiB")
    assert page.text("#percent") == "8 %"
    assert page.one("#progress").get_attribute("value") == "83"
    cells = page.cells("a")
    assert cells["moved"] == "256 MiB of 1.0 GiB"
    assert cells["disks"].startswith("25 %")
    assert cells["activity"].endswith("disk 2 waits for disks")
    bar = page.one("#rows .bar")
    assert bar.accessible_name.startswith("disk 1: 25 %, 256 MiB of 1.0 GiB")
    assert page.driver.title == "8 % · move-it"

    batch.emit("finished", a, duration_s=1.0)
    details = {"step": "convert", "disk": None, "permanent": True, "bundle": "/run/b.tar.gz"}
    batch.emit("started", b, details={"attempt": 1})
    batch.emit("failed", b, text="no system", hint="look inside", log="/l.log", details=details)
    batch.emit("started", c, details={"attempt": 1})
    batch.emit("retrying", c, text="refused", details={"attempt": 2, "at": time.time() + 600})
    page.until(lambda: page.text("#done") == "1 of 3, 1 failed")
    failures = page.one("#failures").text
    for told in ("Failures (1)", "b", "converting", "no system", "look inside", "/run/b.tar.gz"):
        assert told in failures
    assert page.cells("a")["disks"].startswith("100 %")
    page.until(lambda: page.cells("c")["activity"].startswith("again at "))
    assert page.cells("c")["activity"].endswith("refused")

    batch.emit("failed", details={"done": 1, "failed": 1, "cancelled": 1})
    page.until(lambda: page.text("#left") == "failed")
    page.until(
        lambda: page.text("#announcement") == "1 of 3 guests done, 1 failed, the run has failed"
    )
    assert_clean(page, batch)


def assert_clean(page: Page, batch: ServedBatch) -> None:
    """Assert that the page asked only its own server, and that nothing went wrong in it."""
    asked = []
    for entry in page.log("performance"):
        message = json.loads(entry["message"])["message"]
        params = message["params"]
        # Not what the browser's own pages ask for: a new tab is one.
        if message["method"] == "Network.requestWillBeSent" and (
            params["documentURL"].startswith(batch.origin)
        ):
            asked.append(params["request"]["url"])
    assert page.driver.current_url == f"{batch.origin}/"
    assert f"{batch.origin}/api/changes" in asked
    assert f"{batch.origin}/page.css" in asked
    assert [url for url in asked if not url.startswith(f"{batch.origin}/")] == []
    assert [entry["message"] for entry in page.log("browser")] == []


def test_filters_and_order(page: Page, batch: ServedBatch) -> None:
    names = [f"web-{n}" for n in range(1, 13)] + [f"db-{n}" for n in range(1, 5)]
    batch.plan(names)
    for name in names[:4]:
        batch.emit("started", name, details={"attempt": 1})
        batch.emit("started", name, step="copy")
        batch.copy(name, int(name[4:]) << 20)
    batch.emit("started", "db-2", details={"attempt": 1})
    batch.emit("failed", "db-2", text="the disk is full", details={"step": "copy"})
    batch.emit("finished", "db-3", duration_s=1.0)
    page.open(batch)
    assert page.names()[:4] == names[:4]  # those at work come first
    assert page.names()[-2:] == ["db-2", "db-3"]
    assert page.text("#shown") == "16 guests"

    page.choose("copying")
    assert page.names() == names[:4]
    assert page.text("#shown") == "4 of 16 guests"
    assert page.one('#phases [data-phase="copying"]').get_attribute("aria-pressed") == "true"
    # It is kept up to date: who leaves the phase leaves the table.
    batch.emit("finished", "web-1", duration_s=1.0)
    page.until(lambda: page.names() == names[1:4])
    page.choose("copying")
    assert len(page.names()) == 16

    search = page.one("#text")
    search.send_keys("DB")
    page.until(lambda: len(page.names()) == 4)
    page.one("#only-failures").click()
    assert page.names() == ["db-2"]
    search.send_keys(Keys.CONTROL, "a")
    search.send_keys("is full")  # the reason is searched as well
    page.until(lambda: page.names() == ["db-2"])
    search.send_keys(Keys.CONTROL, "a")
    search.send_keys("nobody")
    page.until(lambda: page.names() == [])
    search.clear()
    page.one("#only-failures").click()
    page.until(lambda: len(page.names()) == 16)

    # By keyboard alone: to the header's button, and Enter.
    heading = page.one("#columns .name")
    page.run("arguments[0].querySelector('button').focus()", heading)
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "ascending"
    assert page.names() == [f"db-{n}" for n in range(1, 5)] + [f"web-{n}" for n in range(1, 13)]
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "descending"
    assert page.names()[0] == "web-12"
    page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert page.driver.switch_to.active_element.text.startswith("Phase")
    page.one("#columns .moved button").click()
    assert page.names()[:3] == ["web-1", "db-3", "web-4"]  # the most first, and those that are done
    assert_clean(page, batch)


def test_hostile_names_are_only_text(page: Page, batch: ServedBatch) -> None:
    batch.plan(HOSTILE)
    for name in HOSTILE:
        batch.emit("started", name, details={"attempt": 1})
        batch.emit("failed", name, text=name, hint=name, log=name, details={"step": name})
    limits = {"taken": dict.fromkeys(HOSTILE, 1), "capacities": dict.fromkeys(HOSTILE, 2)}
    batch.emit("limits", details=limits)
    batch.emit("started", details={"batch": HOSTILE[1], "guests": len(HOSTILE)})
    batch.emit("limits", details=limits)
    page.open(batch)
    page.one("#more-failures").click()
    shown = {
        "\u202etxt.exe": "\ufffdtxt.exe",
        "two\nlines": "two lines",
        "\udcff": "\ufffd",
    }
    expected = sorted(shown.get(name, name) for name in HOSTILE)
    assert sorted(page.names()) == expected
    for selector in ("#limits bdi", "#failures bdi"):
        found = page.run(
            f"return [...document.querySelectorAll('{selector}')].map((each) => each.textContent)"
        )
        assert sorted(found) == expected
    assert page.text("#name") == HOSTILE[1]
    assert page.driver.title.endswith(HOSTILE[1])
    assert page.run("return document.querySelectorAll('main img, script').length") == 1
    # A long name makes no page that scrolls sideways.
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    # They can be told apart, and changed.
    batch.emit("finished", "__proto__", duration_s=1.0)
    page.until(lambda: page.cells("__proto__")["phase"] == "done")
    assert_clean(page, batch)


def test_the_server_is_killed_and_comes_back(page: Page) -> None:
    with another_process() as (server, child):
        page.open(server)
        child.kill()
        page.until(lambda: page.text("#connection").startswith("Connection lost at "))
    assert len(page.names()) == 3  # what was known is still there
    assert page.one("#connection").get_attribute("role") == "status"
    with another_process(f"127.0.0.1:{server.port}") as (_, child):
        page.until(lambda: page.text("#connection") == "Live")
        # Stopped in the middle of it all: it says nothing, and its connection stays.
        child.send_signal(signal.SIGSTOP)
        page.run(  # a quarter of a minute goes by
            "const now = performance.now.bind(performance);performance.now = () => now() + 15_000;"
        )
        page.until(lambda: page.text("#connection").startswith("Connection lost at "))
        child.send_signal(signal.SIGCONT)
        page.until(lambda: page.text("#connection") == "Live")


def test_the_stream_alone_breaks(page: Page, batch: ServedBatch) -> None:
    """Somebody between does not let streams through: the page asks instead."""
    batch.plan(2)
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/api/changes"]})
    try:
        page.driver.get(batch.url)
        page.until(lambda: page.text("#connection").startswith("The stream broke at "))
        assert page.names() == ["g001", "g002"]
        batch.emit("started", "g002", details={"attempt": 1})
        page.until(lambda: page.cells("g002")["phase"] == "checking")
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.run("dispatchEvent(new Event('online'))")  # it does not wait for its time then
    page.until(lambda: page.text("#connection") == "Live")


def test_another_token_and_the_end(page: Page) -> None:
    with served() as batch:
        batch.plan(2)
        page.open(batch)
        address = f"127.0.0.1:{batch.port}"
    page.until(lambda: page.text("#connection").startswith("Connection lost"))
    with served(address, token="another"):
        page.until(lambda: "does not accept this page’s token" in page.text("#connection"))
    with served(address) as batch:
        batch.plan(["other"])
        page.until(lambda: page.text("#connection") == "Live")
        assert page.names() == ["other"]  # those of before are gone
        batch.emit("finished", details={"done": 1, "failed": 0, "cancelled": 0})
    page.until(lambda: page.text("#connection").startswith("The run has ended (finished)"))
    assert page.text("#percent") == "100 %"


def test_a_link_from_another_site(page: Page, batch: ServedBatch) -> None:
    """The strict cookie is there for what the page asks for, though not for the link itself."""
    batch.plan(1)
    page.driver.get(f"data:text/html,<a href='{batch.url}'>the batch</a>")
    page.one("a").click()
    page.until(lambda: page.driver.current_url == batch.origin + "/")
    page.until(lambda: page.text("#connection") == "Live")
    [cookie] = page.driver.get_cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.run("return document.cookie") == ""
    assert TOKEN not in page.driver.page_source


def test_nothing_else_is_let_in_or_out(page: Page, batch: ServedBatch) -> None:
    """Even with a script of somebody else in it, the page would send nothing to others."""
    batch.plan(1)
    page.open(batch)
    with served() as other:
        script = """
            const [url, done] = arguments;
            const blocked = [];
            addEventListener("securitypolicyviolation",
                (event) => blocked.push(event.effectiveDirective));
            const image = new Image();
            image.onload = () => done("an image");
            image.src = `${url}/icon.svg`;
            const inline = document.createElement("script");
            inline.textContent = "window.ran = true";
            document.body.append(inline);
            document.body.insertAdjacentHTML("beforeend", "<i onclick='window.ran = true'></i>");
            document.body.lastChild.click();
            fetch(`${url}/healthz`, { mode: "no-cors" }).then(() => done("an answer"), () =>
                setTimeout(() => done([window.ran ?? null, blocked.sort()]), 100));
        """
        found = page.driver.execute_async_script(script, other.origin)
        assert found == [None, ["connect-src", "img-src", "script-src-attr", "script-src-elem"]]
        # Nor may another page show this one.
        page.driver.get(f"data:text/html,<iframe src='{batch.origin}/healthz'></iframe>")
        page.driver.switch_to.frame(page.one("iframe"))
        assert "ok" not in page.text("body")
        page.driver.switch_to.default_content()


def test_500_guests_only_what_changed_is_written(page: Page, batch: ServedBatch) -> None:
    names = batch.plan(700, disks=(GIB, GIB))
    page.open(batch)
    assert page.names() == names[:500]
    page.one("#more-guests").click()
    assert page.names() == names
    page.run(
        "window.touched = new Set();"
        "new MutationObserver((found) => {"
        "  for (const { target } of found) {"
        "    const row = (target.closest ? target : target.parentElement).closest('#rows tr');"
        "    window.touched.add(row ? row.querySelector('bdi').textContent : 'the table');"
        "  }"
        "}).observe(document.querySelector('#rows'),"
        "  { subtree: true, childList: true, characterData: true, attributes: true });"
    )
    begins = [made("started", names[0], details={"attempt": 1})]
    copied = Bytes(total=GIB, data=GIB, copied=GIB // 2)
    begins.append(made("progress", names[0], step="copy", disk=2, bytes=copied))
    batch.send(*begins)
    page.until(lambda: page.cells(names[0])["phase"] == "copying")
    assert page.run("return [...window.touched]") == [names[0]]

    # All of them at once: the page stays quick enough to be used meanwhile.
    page.run(
        "window.longest = 0;"
        "new PerformanceObserver((list) => {"
        "  for (const { duration } of list.getEntries()) {"
        "    window.longest = Math.max(window.longest, duration);"
        "  }"
        "}).observe({ type: 'longtask' });"
    )
    for percent in (10, 20, 30):
        copied = Bytes(total=GIB, data=GIB, copied=GIB * percent // 100)
        events = []
        for name in names:
            events.append(made("started", name, details={"attempt": 1}))
            events.append(made("progress", name, step="copy", disk=1, bytes=copied))
        batch.send(*events)
        wanted = f"{percent - 1} %", f"{percent} %"
        page.until(lambda: page.cells(names[-1])["disks"].startswith(wanted))  # noqa: B023
    assert page.run("return window.longest") < 1000
    assert_clean(page, batch)


def test_what_a_screen_reader_is_told(page: Page, batch: ServedBatch) -> None:
    a, _ = batch.plan(["a", "b"])
    batch.emit("limits", details={"taken": {"disks": 1}, "capacities": {"disks": 8}})
    batch.emit("started", a, details={"attempt": 1})
    batch.copy(a, GIB // 2)
    page.open(batch)
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    }
    for wanted in (
        ("progressbar", "Bytes moved"),
        ("table", "Guests of the batch; the buttons in the header sort"),
        ("rowheader", "a"),
        ("columnheader", "Phase ▲"),
        ("button", "all 2"),
        ("searchbox", "Search"),
        ("checkbox", "Only failures"),
        ("meter", "disks"),
        ("region", "Totals"),
        ("group", "Phase"),
    ):
        assert wanted in told, sorted(told)
    assert any(role == "image" and name.startswith("disk 1: 50 %") for role, name in told)
    assert page.one("#announcement").get_attribute("aria-live") == "polite"
    assert page.text("#announcement") == "0 of 2 guests done, 25 %"
    # Everything that can be pressed can be reached by the keyboard, and shows it.
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        element = page.driver.switch_to.active_element
        reached.append(element.get_attribute("id") or element.text)
    assert {"text", "only-failures"} <= set(reached)
    assert any(text.startswith("Elapsed") for text in reached)
    assert any(text.startswith("all") for text in reached)


@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_widths_and_colours(page: Page, batch: ServedBatch, width: int, scheme: str) -> None:
    batch.plan([f"guest-with-a-name-{n}.example.com" for n in range(9)])
    driver = page.driver
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page.open(batch)
        # Only the table scrolls sideways, in its own box.
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert all(page.one(name).is_displayed() for name in ("#percent", "#columns .disks"))
        for selector in ("#moved", "dt", "#run", "#rows .phase", "#rows .bar b", "#phases button"):
            assert contrast(page, selector) >= 4.5, selector
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(page: Page, selector: str) -> float:
    """Return how much a text stands out from what is behind it (WCAG 2.2, 1.4.3)."""
    colours = page.run(
        "let node = document.querySelector(arguments[0]);"
        "const ink = getComputedStyle(node).color;"
        "let paper = getComputedStyle(node).backgroundColor;"
        "while (paper === 'rgba(0, 0, 0, 0)') {"
        "  node = node.parentElement;"
        "  paper = getComputedStyle(node).backgroundColor;"
        "}"
        "return [ink, paper]",
        selector,
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(luminance(colour) for colour in colours)
    return (light + 0.05) / (dark + 0.05)


def test_sizes_and_times_are_written_as_on_the_terminal(page: Page, batch: ServedBatch) -> None:
    batch.plan(1)
    page.open(batch)
    sizes = [0, 1, 1023, 1024, 1536, 100 * 1024, 999 * 1024, 1000 * 1024, 5 << 30, 3 << 45]
    seconds = [0, 0.4, 1, 59.4, 59.6, 61, 3599, 3600, 86400 * 3]
    script = (
        "const [sizes, seconds, done] = arguments;"
        "import('/format.js').then((f) => done([sizes.map(f.size), seconds.map(f.duration)]));"
    )
    found = page.driver.execute_async_script(script, sizes, seconds)
    assert found == [[format_size(n) for n in sizes], [format_duration(s) for s in seconds]]
