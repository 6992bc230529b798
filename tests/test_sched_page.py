"""The scheduler's page in a real browser: what it shows, by mouse and keyboard, in every size and theme."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from crossedge.sched.api import create_app
from crossedge.sched.service import SchedulerService
from tests.sched_fleet import TOKEN, Fleet, Floats, VirtualClock, make_service, two_regions

pytestmark = pytest.mark.tool("chromium")
READY = "html[data-ready]"
WAIT = 30_000  # ms for anything on the page to come about on a busy machine


class Server:
    """A scheduler that a fleet has reported to, on a port of this machine."""

    def __init__(self, directory: Path, rtt: Floats, silent: tuple[str, ...] = ()) -> None:
        self.clock = VirtualClock()
        self.fleet = Fleet(rtt)
        self.service: SchedulerService = make_service(directory, self.clock)
        self._silent = silent
        config = uvicorn.Config(
            create_app(self.service, lifespan=False), host="127.0.0.1", port=0, log_level="warning"
        )
        self.server = uvicorn.Server(config)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.fleet.report_all(self.service, self._silent)
        await self.service.round()
        await self.server.serve()
        await self.service.stop()

    def start(self) -> str:
        """Return the page's address."""
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.02)
            assert self.thread.is_alive(), "the server did not start"
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    def round(self, seconds: float = 30.0, silent: tuple[str, ...] = ()) -> None:
        """Let everybody but the silent report again, and compute."""

        async def again() -> None:
            self.clock.at += seconds
            self.fleet.report_all(self.service, silent)
            await self.service.round()

        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(again(), self.loop).result(60)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@contextmanager
def served(directory: Path, rtt: Floats, silent: tuple[str, ...] = ()) -> Iterator[tuple[Server, str]]:
    server = Server(directory, rtt, silent)
    address = server.start()
    try:
        yield server, address
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    rtt = two_regions()
    rtt[0, 5] = rtt[5, 0] = np.inf
    with served(tmp_path_factory.mktemp("small"), rtt) as made:
        yield made


@contextmanager
def opened(
    browser: Browser,
    address: str,
    width: int = 1280,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
) -> Iterator[Page]:
    """Yield the page once it shows something; whatever it complains of, or asks elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(address) else complaints.append(request.url)
    )
    page.goto(address)
    page.wait_for_selector(READY)
    yield page
    context.close()
    assert complaints == []


def test_it_shows_nodes_groups_paths_and_ages(browser: Browser, small: tuple[Server, str]) -> None:
    with opened(browser, small[1]) as page:
        expect(page.locator("#summary")).to_contain_text("8 nodes (8 fresh), 2 groups")
        expect(page.locator("#groups li").first).to_contain_text("4 nodes")
        expect(page.locator("#nodes tbody tr")).to_have_count(8)
        first = page.locator("#nodes tbody tr").first
        expect(first.locator("td").nth(0)).to_have_text("n0")
        expect(first.locator("td").nth(2)).to_have_text("fresh")
        expect(first.locator("td").nth(3)).to_contain_text(" s")
        expect(first.locator("td").nth(6)).to_have_text("1")  # unreachable
        expect(page.locator("#heat-legend")).to_contain_text("unreachable")
        drawn = page.evaluate(
            """async () => {
              await new Promise(requestAnimationFrame);  // what has come is drawn in the next frame
              return ["map", "heat"].map(id => {
                const canvas = document.getElementById(id);
                const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                return new Set(new Uint32Array(data.buffer)).size; }); }"""
        )
        assert min(drawn) > 10  # colours: something is on both


def test_everything_can_be_done_by_keyboard(browser: Browser, small: tuple[Server, str]) -> None:
    with opened(browser, small[1]) as page:
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
            if reached[-1] == "filter":
                break
        order = ["theme", "find", "show-direct", "map", "order", "heat", "replicas", "users", "try", "filter"]
        assert [name for name in reached if name in order] == order
        page.locator("#map").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#node h3")).to_have_count(1)
        before = page.inner_text("#node h3")
        moved = set()
        for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"):
            page.keyboard.press(key)
            moved.add(page.inner_text("#node h3"))
        assert moved - {before}
        seen = []
        for _ in range(8):
            page.keyboard.press("n")
            seen.append(page.inner_text("#node h3"))
        assert len(set(seen)) == 8
        page.keyboard.press("p")
        assert page.inner_text("#node h3") == seen[-2]
        page.keyboard.press("Escape")
        expect(page.locator("#node h3")).to_have_count(0)
        page.locator("#heat").focus()
        for key in ("ArrowDown", "ArrowRight", "End", "Home", "Shift+ArrowDown"):
            page.keyboard.press(key)
        expect(page.locator("#cell")).to_contain_text(" to ")
        page.keyboard.press("Enter")
        expect(page.locator("#node h3")).to_have_count(1)


def test_a_pair_that_does_not_answer_has_no_number(browser: Browser, small: tuple[Server, str]) -> None:
    with opened(browser, small[1]) as page:
        page.select_option("#order", "name")
        page.locator("#heat").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Home")
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        expect(page.locator("#cell")).to_have_text("n0 to n5: unreachable")


def test_another_order_is_there_at_once_and_the_cursor_stays_on_its_pair(
    browser: Browser, small: tuple[Server, str]
) -> None:
    with opened(browser, small[1]) as page:
        page.route("**/v1/**", lambda _: None)  # from here on nothing is answered
        page.locator("#heat").focus()
        rows = []
        for order in ("group", "name"):
            page.select_option("#order", order)
            page.locator("#heat").press("Home")
            row = [page.inner_text("#cell")]
            for _ in range(7):
                page.keyboard.press("ArrowRight")
                row.append(page.inner_text("#cell"))
            rows.append(row)
        first = rows[0][0].split()[0]
        assert [text.split(":")[0] for text in rows[1]] == [f"{first} to n{i}" for i in range(8)]
        assert sorted(rows[0]) == sorted(rows[1])  # the same numbers
        page.select_option("#order", "group")
        assert page.inner_text("#cell") == rows[1][-1]
        page.locator("#heat").press("ArrowLeft")
        assert page.inner_text("#cell") == rows[0][rows[0].index(rows[1][-1]) - 1]


def test_a_placement_is_explained_kept_and_deleted(browser: Browser, small: tuple[Server, str]) -> None:
    with opened(browser, small[1]) as page:
        page.fill("#replicas", "1")
        page.fill("#users", "n5=10, n6=2")
        page.keyboard.press("Tab")
        page.click("#try")
        expect(page.locator("#answer dl")).to_contain_text("not below")
        expect(page.locator("#answer")).to_contain_text("chosen")
        expect(page.locator("#answer")).to_contain_text("random")
        assert page.inner_text("#answer dd").strip() in {"n4", "n5", "n6", "n7"}
        page.click("#keep summary")
        page.fill("#service", "shop")
        page.fill("#token", TOKEN)
        page.click("#save")
        expect(page.locator("#services")).to_contain_text("shop")
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#services button:has-text('Delete')")
        expect(page.locator("#services")).to_contain_text("None yet")


def test_a_service_that_has_not_changed_is_not_shown_anew(
    browser: Browser, small: tuple[Server, str]
) -> None:
    with opened(browser, small[1]) as page:
        page.fill("#replicas", "1")
        page.click("#keep summary")
        page.fill("#service", "still")
        page.fill("#token", TOKEN)
        page.click("#save")
        delete = page.locator("#services button:has-text('Delete')")
        delete.focus()
        for _ in range(2):  # the second look begins after all that the first one brought is shown
            with page.expect_response("**/v1/services"):
                pass
        expect(delete).to_be_focused()
        page.on("dialog", lambda dialog: dialog.accept())
        page.keyboard.press("Enter")
        expect(page.locator("#services")).to_contain_text("None yet")


@pytest.mark.parametrize(
    ("users", "what"),
    [("n1=", '"n1="'), ("n1=0", "above 0"), ("n1=1, n1=2", "twice"), ("nobody=3", "nobody")],
)
def test_what_is_wrong_is_said_where_it_was_written(
    browser: Browser, small: tuple[Server, str], users: str, what: str
) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(small[1])
    page.wait_for_selector(READY)
    page.fill("#users", users)
    page.click("#try")
    expect(page.locator("#place-error")).to_contain_text(what)
    assert page.inner_text("#answer") == ""
    context.close()


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Browser, small: tuple[Server, str], width: int) -> None:
    with opened(browser, small[1], width=width, height=640) as page:
        page.click("#try")
        page.wait_for_selector("#answer table")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        small_ones = page.evaluate(
            """() => [...document.querySelectorAll('button, select')]
              .filter(e => e.offsetParent && e.offsetHeight < 20).length"""
        )
        assert small_ones == 0


def test_light_and_dark_follow_the_system_and_the_reader(browser: Browser, small: tuple[Server, str]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, small[1], scheme="dark") as page:
        dark = page.evaluate(paper)
        page.select_option("#theme", "light")
        light = page.evaluate(paper)
        page.reload()
        page.wait_for_selector(READY)
        assert page.evaluate(paper) == light  # it is remembered
    with opened(browser, small[1], scheme="light") as page:
        assert page.evaluate(paper) == light != dark
        ratios = page.evaluate(
            """() => {
              const light = text => {
                const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text;
                c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3)
                  .map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0); };
              const panel = light(getComputedStyle(document.querySelector('section')).backgroundColor);
              return [...document.querySelectorAll('h2, .hint, td, th, a, label')].map(e => {
                const ink = light(getComputedStyle(e).color);
                return (Math.max(ink, panel) + .05) / (Math.min(ink, panel) + .05); }); }"""
        )
        assert min(ratios) >= 4.5  # WCAG 2.2, 1.4.3


def test_a_new_round_is_shown_without_a_reload(browser: Browser, tmp_path: Path) -> None:
    with (
        served(tmp_path, two_regions((2, 2)), silent=("n3",)) as (server, address),
        opened(browser, address) as page,
    ):
        expect(page.locator("#summary")).to_contain_text("3 nodes")
        server.round()
        expect(page.locator("#summary")).to_contain_text("4 nodes (4 fresh)", timeout=WAIT)
        expect(page.locator("#nodes tbody tr")).to_have_count(4, timeout=WAIT)


def test_a_new_round_moves_the_cursor_with_its_pair_and_says_what_is_new(
    browser: Browser, tmp_path: Path
) -> None:
    with (
        served(tmp_path, two_regions((2, 2)), silent=("n1",)) as (server, address),
        opened(browser, address) as page,
    ):
        cell = page.locator("#cell")
        page.select_option("#order", "name")
        page.locator("#heat").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        expect(cell).to_contain_text("n0 to n3: 4")
        server.fleet.rtt[0, 3] = server.fleet.rtt[3, 0] = np.inf
        server.round()
        expect(cell).to_have_text("n0 to n3: unreachable", timeout=WAIT)
        page.keyboard.press("ArrowLeft")
        expect(cell).to_contain_text("n0 to n2: ")
        server.round(server.service.config.nodes.forget_after + 1, silent=("n2",))
        expect(cell).to_have_text("", timeout=WAIT)


def test_when_the_scheduler_is_gone_the_page_says_so_and_keeps_what_it_has(
    browser: Browser, tmp_path: Path
) -> None:
    context = browser.new_context()
    page = context.new_page()
    with served(tmp_path, two_regions((2, 2))) as (_, address):
        page.goto(address)
        page.wait_for_selector(READY)
    expect(page.locator("#problems")).to_contain_text("has not answered", timeout=WAIT)
    expect(page.locator("#nodes tbody tr")).to_have_count(4)
    context.close()


def test_a_look_that_fails_half_way_loses_nothing(browser: Browser, small: tuple[Server, str]) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route("**/v1/map?*", lambda route: route.abort(), times=1)
    page.goto(small[1])
    page.wait_for_selector(READY)
    expect(page.locator("#groups li").first).to_contain_text("4 nodes")
    expect(page.locator("#problems li")).to_have_count(0)
    context.close()


@pytest.mark.slow
def test_two_thousand_nodes_are_shown_and_found(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    count = 2000
    centres = rng.uniform(-80, 80, (8, 2))
    places = centres[rng.integers(0, 8, count)] + rng.normal(0, 4, (count, 2))
    rtt = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)) + 2
    hidden = rng.random((count, count)) > 16 / count
    rtt[hidden & hidden.T] = np.nan
    np.fill_diagonal(rtt, 0.0)
    with served(tmp_path, rtt) as (_, address), opened(browser, address) as page:
        expect(page.locator("#summary")).to_contain_text("2000 nodes")
        expect(page.locator("#nodes tbody tr")).to_have_count(50)
        page.fill("#filter", "n1999")
        expect(page.locator("#nodes tbody tr")).to_have_count(1)
        page.fill("#find", "n1234")
        page.keyboard.press("Enter")
        expect(page.locator("#node h3")).to_have_text("n1234")
        for kind in ("direct", "relayed", "unreachable"):
            page.check(f"#show-{kind}")
        took = page.evaluate(
            """async () => {
              const frame = () => new Promise(requestAnimationFrame);
              const begin = performance.now();
              for (let i = 0; i < 10; i++) {
                const key = {key: i % 2 ? '-' : '+'};
                document.getElementById('map').dispatchEvent(new KeyboardEvent('keydown', key));
                await frame();
                await frame();
              }
              return (performance.now() - begin) / 10; }"""
        )
        print(f"zooming 2,000 nodes and their paths takes {took:.0f} ms")
        assert took < 1000
