"""The page of conversations by voice: heard, answered in writing or aloud, interrupted, by keys, on a phone."""

from __future__ import annotations

from kimi_mm.evaluation.wer import word_error_rate
from tests.serving.browser import CLIP, Browser
from tests.serving.conftest import KEY


def lines(browser: Browser, who: str) -> list[str]:
    return [line.text for line in browser.all(f".line.{who} .words")]


def answered(browser: Browser) -> None:
    """Waits until the first answer is whole."""
    browser.until(lambda: browser.all(".line.model .words:not(.waiting)"), 30)


def test_a_turn_is_heard_and_answered_in_writing(browser, hearing):
    browser.open(f"{hearing.url}/talk", 360, 740, dark=True)
    browser.ready()
    assert browser.overflow() == 0
    assert "in writing" in browser.at("#lead").text
    browser.at("#record").click()
    browser.until(lambda: browser.at("#state").text == "Listening to you")
    browser.until(lambda: int(browser.at("#level").get_attribute("aria-valuenow")) > 10)
    answered(browser)
    browser.until(lambda: browser.all(".line.you .words:not(.waiting)"))
    for who in ("you", "model"):
        [text] = lines(browser, who)
        assert word_error_rate([CLIP["text"]], [text], draws=0).rate < 0.7, text
    assert "first word after" in browser.at(".line.model .about").text
    assert browser.at("#state").text == "Your turn"
    assert browser.at("#said").get_attribute("role") == "log"
    assert browser.overflow() == 0
    browser.at("#record").click()
    assert browser.at("#state").text == "Not started"
    hearing.wait_until("kimi_mm_sessions", 0)
    browser.at("#clear").click()
    assert not browser.all(".line")
    assert browser.at("#nothing").is_displayed()
    assert browser.complaints() == []


def test_answers_are_heard_and_fall_silent_when_interrupted(browser, tiny):
    from selenium.common.exceptions import TimeoutException

    browser.open(f"{tiny.url}/talk")
    browser.until(lambda: browser.at("#key-form").is_displayed())
    browser.at("#key").send_keys(KEY)
    browser.at("#key-form button").click()
    browser.ready()
    assert "aloud" in browser.at("#lead").text
    browser.complaints()  # the browser notes the status 401
    for _ in range(4):  # what the untrained model says may be over before it can be interrupted
        browser.at("#record").click()
        browser.until(lambda: browser.all(".line.model"), 30)
        try:
            browser.until(lambda: browser.all("body.speaking"), 5)
            browser.until(lambda: int(browser.at("#level").get_attribute("aria-valuenow")) > 2, 3)
            browser.at("#interrupt").click()
            browser.until(lambda: "interrupted" in browser.at(".line.model .about").text, 2)
            break
        except TimeoutException:
            browser.at("#record").click()
            browser.at("#clear").click()
    assert not browser.all("body.speaking")
    about = browser.at(".line.model .about").text
    assert "first sound after" in about
    assert "of speech" in about
    assert not browser.at("#interrupt").is_enabled()
    assert browser.complaints() == []
    browser.at("#record").click()
    tiny.wait_until("kimi_mm_sessions", 0)
    tiny.wait_until("kimi_mm_rows_running", 0)


def test_keys_alone_start_and_end_a_talk(browser, nano):
    from selenium.webdriver.common.keys import Keys

    browser.open(f"{nano.url}/talk")
    browser.ready()
    for _ in range(4):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    button = browser.driver.switch_to.active_element
    assert button.get_attribute("id") == "record"
    assert browser.driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", button) == "solid"
    button.send_keys(Keys.ENTER)
    browser.until(lambda: browser.all("body.recording"))
    assert browser.at("#record-name").get_attribute("textContent") == "End the talk"
    button.send_keys(Keys.ESCAPE)  # there is nothing to interrupt
    browser.until(lambda: browser.at("#state").text == "Listening to you")
    button.send_keys(Keys.ENTER)
    browser.until(lambda: browser.at("#state").text == "Not started")
    nano.wait_until("kimi_mm_sessions", 0)
    assert browser.complaints() == []


def test_a_talk_that_is_refused_says_so(browser, started):
    server = started("nano", "{silent_seconds: 300, session_seconds: 2}")
    browser.open(f"{server.url}/talk")
    browser.ready()
    browser.at("#record").click()
    browser.until(lambda: browser.at("#fault").text == "The session has expired")
    assert browser.at("#state").text == "Not started"
