"""The page at ``/``, used in headless Chromium as a person would."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from support import browser
from support.serving import served, wait_until_idle

from jaxllm import AsyncLLM

CHROMIUM = browser.find()

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium-headless-shell"),
]


@pytest.fixture
def page(url: str) -> Iterator[browser.Page]:
    assert CHROMIUM is not None
    with browser.browsing(CHROMIUM) as page:
        page.open(url)
        yield page


def say(page: browser.Page, text: str, count: int) -> None:
    """Say something, and wait for the end of the answer."""
    page.fill("text", text)
    page.press_enter()
    page.wait(f"document.querySelectorAll('.message').length === {count} && !document.getElementById('send').hidden")


def test_a_talk(page: browser.Page, client: openai.OpenAI):
    page.fill("temperature", "0")
    page.fill("tokens", "8")
    # whoever writes HTML sees what was written
    first, second = "What is <b>this</b> & <script>throw 1</script>?" + " And so on." * 5, "And that?"
    talk: list[dict[str, str]] = []
    for turn, text in enumerate((first, second), 1):
        talk.append({"role": "user", "content": text})
        say(page, text, 2 * turn)
        answer = client.chat.completions.create(model="tiny", messages=talk, temperature=0, max_tokens=8)  # pyright: ignore[reportArgumentType]
        content = answer.choices[0].message.content or ""
        assert page.text(".user") == text
        assert page.value("[...document.querySelectorAll('.content')].at(-1).textContent") == content
        talk.append({"role": "assistant", "content": content})
        assert page.text(".note").startswith("8 tokens, ") and "per second" in page.text(".note")
    # the second prompt begins with the first one
    assert int(page.text(".note").split("; ")[1].split(" of ")[0]) > 0
    assert not page.errors


def test_how_the_engine_does(page: browser.Page):
    page.wait("document.getElementById('model').textContent === 'tiny'")
    page.fill("tokens", "150")
    say(page, "Count.", 2)
    page.wait("document.getElementById('hits').textContent.endsWith('%')")
    page.wait("Number(document.getElementById('rate').textContent) >= 0")
    assert page.text("#load") == "0, 0" and page.text("#usage").endswith("%")
    assert page.value("document.getElementById('plan').textContent.includes('KV cache')")
    assert not page.errors


def test_stopping_and_beginning_anew(page: browser.Page, engine: AsyncLLM):
    before = engine.engine.core.stats().generation_tokens
    page.fill("tokens", "230")
    page.fill("text", "Go on.")
    page.click("send")
    page.wait("!document.getElementById('stop').hidden")
    page.click("stop")
    page.wait("!document.getElementById('send').hidden")
    wait_until_idle(engine)
    assert engine.engine.core.stats().generation_tokens - before < 230
    page.click("clear")
    page.wait("document.querySelectorAll('.message').length === 0")
    # and it starts from nothing
    page.fill("tokens", "3")
    say(page, "Again.", 2)
    assert page.text(".note").startswith("3 tokens") and page.text(".error") == ""
    assert not page.errors


def test_a_server_with_a_key(page: browser.Page, engine: AsyncLLM):
    with served(engine, api_keys=("secret",)) as url:
        page.open(url)
        say(page, "Hello?", 2)
        assert "The API key is missing or wrong" in page.text(".error")
        page.fill("key", "secret")
        page.fill("tokens", "3")
        say(page, "Hello?", 4)
        assert page.text(".note").startswith("3 tokens")
        page.wait("document.getElementById('model').textContent === 'tiny'")
    # the browser's own words for what was refused, and nothing else
    assert all("401" in error for error in page.errors), page.errors
