"""The page in headless Chromium: send, stream, stop, reload, a key asked for, a server gone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import train_models
from servers import Server

pytestmark = pytest.mark.browser
KEY = "a-key-that-nobody-guesses"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_window_size(390, 844)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    made = Server(
        *(train_models.make(folder / "model"), "--served-model-name", "tiny"),
        log=folder / "log",
        env={"PARALLAMA_API_KEY": KEY},
    )
    yield made
    made.child.kill()


def test_the_page(browser: Any, server: Server):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def one(name: str) -> Any:
        return browser.find_element(By.ID, name)

    def lines() -> list[str]:
        return [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#talk li")]

    def until(check: Any) -> Any:
        return WebDriverWait(browser, 30, 0.05).until(lambda _driver: check())

    browser.get(server.url)
    # a key is asked for
    until(lambda: one("asked").get_attribute("open"))
    one("asked-key").send_keys(KEY, Keys.ENTER)
    until(lambda: "tiny" in one("model").text)
    # settings, by keyboard; nothing is wider than a phone
    browser.find_elements(By.TAG_NAME, "summary")[0].click()
    for name, value in (("seed", "3"), ("limit", "40"), ("temperature", "0.5")):
        one(name).clear()
        one(name).send_keys(value)
    width = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.execute_script(width)
    # send and stream
    one("text").send_keys("Hello there", Keys.ENTER)
    until(lambda: "tokens" in one("status").text)
    first = lines()
    assert len(first) == 2 and "Hello there" in first[0] and len(first[1]) > 5, first
    # stop
    for name, value in (("limit", "1900"), ("temperature", "0")):
        one(name).clear()
        one(name).send_keys(value)
    one("text").send_keys("On and on", Keys.ENTER)
    until(lambda: len(lines()) == 4 and len(lines()[3]) > 20)
    one("stop").click()
    until(lambda: one("status").text == "stopped")
    # reload: what was said stays
    browser.refresh()
    until(lambda: "tiny" in one("model").text)
    assert lines()[:2] == first
    # the mesh
    browser.find_elements(By.TAG_NAME, "summary")[1].click()
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#tensors tr"))
    loaded = "const i = document.querySelector('#drawing img'); return i.naturalWidth > 0"
    until(lambda: browser.execute_script(loaded))
    assert browser.execute_script(width)
    # nothing came from elsewhere, and everything has a name
    names = "return performance.getEntriesByType('resource').map((each) => each.name)"
    found = browser.execute_script(names)
    assert all(name.startswith((server.url, "blob:", "data:")) for name in found), found
    browser.find_elements(By.TAG_NAME, "summary")[0].click()
    for field in browser.find_elements(By.CSS_SELECTOR, "main input, textarea, main button"):
        assert field.accessible_name, field.get_attribute("id")
    browser.get(f"{server.url}/docs")
    until(lambda: "/v1/chat/completions" in browser.find_element(By.ID, "routes").text)
    # the server is gone
    browser.get(server.url)
    until(lambda: "tiny" in one("model").text)
    server.child.kill()
    one("text").send_keys("Still there?", Keys.ENTER)
    until(lambda: one("status").text == "the server is gone")
    severe = [each for each in browser.get_log("browser") if "Content Security" in each["message"]]
    assert not severe, severe


def test_the_page_needs_no_other_server():
    folder = Path(train_models.__file__).parents[1] / "src/parallama/serve/page"
    for file in folder.iterdir():
        assert "http://" not in file.read_text() and "https://" not in file.read_text(), file
