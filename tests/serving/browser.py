"""A headless Chromium, driven as a visitor would, with a microphone that hears a recording."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kimi_mm.cli.demo import CLIPS, read_clips

CLIP = max(read_clips(), key=lambda clip: -abs(clip["seconds"] - 4.6))


def words(text: str) -> list[str]:
    """Words in small letters."""
    return re.findall(r"[\w']+", text.lower())


class Browser:
    """A Chromium whose microphone hears CLIP; what it saves goes to `saved`."""

    def __init__(self, driver, saved: Path) -> None:
        self.driver, self.saved = driver, saved

    def open(self, url: str, width: int = 1100, height: int = 1000, dark: bool = False) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def at(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def until(self, true: Callable[[], object], seconds: float = 15.0) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, 0.05).until(lambda _: true())

    def ready(self) -> None:
        self.until(lambda: self.at("#record").is_enabled())

    def heard(self) -> str:
        """Waits for the newest turn's end and returns its text."""
        self.until(lambda: self.all(".turn:first-child .times:not([hidden])"))
        return " ".join(line.text for line in self.all(".turn:first-child .segment span"))

    def overflow(self) -> int:
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra 'dev'")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver on PATH")
    spoken = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    wave, rate = soundfile.read(CLIPS / CLIP["file"])
    soundfile.write(spoken, np.concatenate([np.zeros(rate // 4), wave, np.zeros(30 * rate)]), rate, subtype="PCM_16")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--autoplay-policy=no-user-gesture-required",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={spoken}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(spoken.parent)})
    session = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield Browser(session, spoken.parent)
    session.quit()
