"""The page in a real browser, over an engine without a model."""

import shutil

import openai
import pytest

from tests.fake_engine import FakeEngine
from tests.serving import serving

PROMPT = "the quick"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def test_the_page_in_a_browser():
    """It streams text, shows probabilities, says what is wrong, and asks no other host for anything."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is installed")
    api = pytest.importorskip("playwright.sync_api")
    asked, failures = [], []
    with serving(FakeEngine(max_length=64)) as (server, _, _), api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            page = running.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: failures.append(error))
            page.goto(server)
            page.get_by_label("Prompt").fill(PROMPT)
            for name, value in (("max_tokens", "30"), ("temperature", "0")):
                page.fill(f"#{name}", value)
            page.get_by_role("button", name="Continue").click()
            page.wait_for_function(
                "document.querySelector('#status').textContent.includes('limit was reached')"
            )
            assert page.inner_text("#model") == "tiny"
            tokens = page.locator("#output .token")
            assert tokens.count() == 30
            client = openai.OpenAI(base_url=f"{server}/v1", api_key="-")
            text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30).choices[0].text
            assert page.evaluate("document.querySelector('#output').textContent") == PROMPT + text
            tokens.first.click()
            shares = [float(cell.rstrip(" %")) for cell in page.locator("td:nth-child(2)").all_inner_texts()]
            assert shares == [50.0, 25.0, 12.5, 6.3, 3.1]
            page.fill("#max_tokens", "5000")
            page.get_by_role("button", name="Continue").click()
            page.wait_for_selector("#status.error")
            assert "past the 64 tokens" in page.inner_text("#status")
        finally:
            running.close()
    assert not failures
    assert {url.startswith((server, "data:")) for url in asked} == {True}
