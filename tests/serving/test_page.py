"""The page: its files, and a person who uses it in headless Chromium.

Where PTV2_PAGE_PICTURES names a folder, pictures of a wide and a narrow window are written there.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.http_parts import Asked, Running, running
from tests.serving.service_parts import digest

FILES = {
    "/": "text/html; charset=utf-8",
    "/page.css": "text/css; charset=utf-8",
    "/page.js": "text/javascript; charset=utf-8",
    "/icon.svg": "image/svg+xml",
}


@pytest.mark.parametrize(("path", "media_type"), FILES.items())
def test_page_files_need_nothing_from_elsewhere(path: str, media_type: str) -> None:
    response = Asked().get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    known = ("http://www.w3.org/2000/svg",)
    assert set(re.findall(r"https?://[^\s\"'`<>)]+", response.text)) <= set(known)


def test_page_has_no_script_or_style_inside() -> None:
    text = Asked().get("/").text
    assert re.findall(r"<script(?! src=\"/page\.js\" defer)", text) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", text) == []


def test_page_names_every_field_and_region() -> None:
    text = Asked().get("/").text
    assert '<html lang="en">' in text
    labels = set(re.findall(r'<label for="([^"]+)"', text))
    assert labels == set(re.findall(r'<(?:input|select|textarea) id="([^"]+)"', text))
    for named in re.findall(r'aria-labelledby="([^"]+)"', text):
        assert f'id="{named}"' in text


def test_page_script_writes_no_html() -> None:
    text = Asked().get("/page.js").text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in text


# in a browser

browser_parts = pytest.importorskip("tests.serving.browser_parts", reason="needs websockets")
PROGRAM = browser_parts.browser()
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
TOKEN = "a" * 32
PICTURES = os.environ.get("PTV2_PAGE_PICTURES")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator["browser_parts.Page"]:
    with browser_parts.opened(PROGRAM, tmp_path_factory.mktemp("browser")) as found:
        yield found


def open_page(page: "browser_parts.Page", server: Running, *, width: int = 1280) -> None:
    page.events.clear()
    page.resize(width, 900)
    page.open(server.base + "/")
    page.wait("!document.getElementById('send').disabled")


def choose(page: "browser_parts.Page", task: str) -> None:
    page.run(
        f"(() => {{ const s = document.getElementById('task'); s.value = '{task}';"
        " s.dispatchEvent(new Event('change')); })()"
    )


def ask(page: "browser_parts.Page") -> str:
    page.run("document.getElementById('form').requestSubmit()")
    page.wait("document.querySelector('#answer .who') !== null")
    return str(page.text("#answer"))


@needs_browser
@pytest.mark.slow
def test_page_answers_a_text_typed_with_the_keyboard(
    page: "browser_parts.Page", server: Running
) -> None:
    open_page(page, server)
    page.run("document.getElementById('field-text').select()")
    page.type("hi")
    page.press("Enter", 13, modifiers=2)
    page.wait("document.querySelector('#answer .who') !== null")
    answer = page.text("#answer")
    assert answer.startswith("play\n")
    for expected in ("play\n70.0 %", "version\n3", digest("intents:3")[:12], "3.4 ms"):
        assert expected in answer
    assert page.text("#state") == "ready"
    assert page.complaints() == []
    assert {address.removeprefix(server.base).partition("?")[0] for address in page.asked()} >= {
        "/", "/page.css", "/page.js", "/v1/tasks", "/v1/status", "/v1/tasks/intents/predict",
    }  # fmt: skip
    assert all(address.startswith(server.base) for address in page.asked())


@needs_browser
@pytest.mark.slow
def test_page_has_the_fields_and_the_answer_of_every_form(
    page: "browser_parts.Page", server: Running
) -> None:
    open_page(page, server)
    fields = "[...document.querySelectorAll('#fields label')].map((one) => one.innerText)"
    choose(page, "reading")
    assert page.run(fields) == ["question", "context"]
    assert ask(page).startswith("Rome.\n")
    assert page.text("#answer mark") == "Rome."
    choose(page, "slots")
    assert ask(page).startswith("book a table in rome")
    assert page.text("#answer mark") == "romeplace"
    choose(page, "copa")
    assert page.run(fields) == ["text", "choices (one a line)", "question (optional)"]
    assert "The street got wet.\n50.0 %" in ask(page)
    choose(page, "pairs")
    assert page.run(fields) == ["text", "second text"]
    assert "70.0 %" in ask(page)
    choose(page, "scores")
    assert ask(page).startswith("1.000")
    assert page.complaints() == []


@needs_browser
@pytest.mark.slow
def test_page_shows_texts_as_texts(page: "browser_parts.Page", server: Running) -> None:
    open_page(page, server)
    choose(page, "slots")
    page.run("document.getElementById('field-text').value = '<img src=x onerror=alert(1)> &amp;'")
    assert ask(page).startswith("<img src=x onerror=alert(1)> &amp;")
    assert page.run("document.querySelectorAll('#answer img').length") == 0


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 360])
def test_page_fits_wide_and_narrow_windows(
    page: "browser_parts.Page", server: Running, width: int
) -> None:
    open_page(page, server, width=width)
    ask(page)
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("document.querySelectorAll('#loaded tr').length") == 6
    columns = "getComputedStyle(document.getElementById('ask')).gridTemplateColumns.split(' ')"
    assert page.run(f"{columns}.length") == (2 if width > 860 else 1)
    if PICTURES:
        # so that the chart has lines
        page.wait("state.history.length >= 4")
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.photograph(Path(PICTURES) / f"page-{width}.png")


@needs_browser
@pytest.mark.slow
def test_page_says_why_there_is_no_answer(page: "browser_parts.Page", server: Running) -> None:
    open_page(page, server)
    page.run("document.getElementById('field-text').value = ' '")
    page.run("document.getElementById('field-text').required = false")
    page.run("document.getElementById('form').requestSubmit()")
    page.wait("!document.getElementById('error').hidden")
    assert page.text("#error").startswith("input 1: expected a `text`")


@needs_browser
@pytest.mark.slow
def test_page_asks_for_the_list_again_only_when_it_may_have_changed(
    page: "browser_parts.Page", server: Running
) -> None:
    open_page(page, server)
    page.wait("state.history.length >= 3")
    asked = [address.removeprefix(server.base) for address in page.asked()]
    assert asked.count("/v1/status") >= 3
    assert asked.count("/v1/tasks") == 1
    page.run("state.listed = 'another'")
    page.run("state.history.length = 0")
    page.wait("state.history.length >= 2")
    assert [address.removeprefix(server.base) for address in page.asked()].count("/v1/tasks") == 2


@needs_browser
@pytest.mark.slow
def test_page_asks_for_a_token_and_uses_it(page: "browser_parts.Page", tmp_path: Path) -> None:
    with running(tokens=[TOKEN]) as server:
        page.events.clear()
        page.open(server.base + "/")
        page.wait("!document.getElementById('token-form').hidden")
        page.run("document.getElementById('token').focus()")
        page.type(TOKEN)
        page.press("Enter", 13)
        page.run("document.getElementById('token-form').requestSubmit()")
        page.wait("!document.getElementById('send').disabled")
        assert "70.0 %" in ask(page)
        assert TOKEN not in page.run("document.documentElement.outerHTML")
