"""The page: its files and headers by HTTP; what a visitor does, in a headless Chromium with a fed microphone."""

from __future__ import annotations

import base64
import re

import pytest
import requests
import soundfile

from kimi_mm.audio.io import read_audio
from kimi_mm.cli.demo import CLIPS
from kimi_mm.evaluation.wer import word_error_rate
from kimi_mm.serving.page import SAMPLE, STATIC, assets
from tests.serving.browser import CLIP, words
from tests.serving.conftest import KEY

FILES = [address for address in assets() if address != "/static/sample.flac"]


@pytest.mark.parametrize("address", sorted(assets()))
def test_files_come_with_a_tag_and_a_policy(tiny, address):
    answer = requests.get(tiny.url + address, timeout=20)
    assert answer.status_code == 200
    assert answer.content == assets()[address].data
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    again = requests.get(tiny.url + address, headers={"If-None-Match": answer.headers["ETag"]}, timeout=20)
    assert (again.status_code, again.content) == (304, b"")
    assert requests.get(tiny.url + address, headers={"If-None-Match": '"old"'}, timeout=20).status_code == 200


def test_nothing_comes_from_elsewhere():
    known = {*assets(), "/v1/models", "/v1/audio/codes", "/v1/audio/transcriptions", "/openapi.json"}
    for address in FILES:
        text = assets()[address].data.decode()
        text = text.replace("http://www.w3.org/2000/svg", "").replace("https://creativecommons.org/licenses/", "")
        assert "://" not in text, address
        assert set(re.findall(r'["(](/[\w/.]+)["(]', text)) <= known, address
    for name in ("index.html", "talk.html"):
        assert not re.search(r"<style|style=|\son\w+=", (STATIC / name).read_text(encoding="utf-8"))


def test_codes_are_those_of_the_tokenizer(nano):
    import kimi_mm

    answer = requests.post(f"{nano.url}/v1/audio/codes", files={"file": SAMPLE.read_bytes()}, timeout=60).json()
    wave, seconds = read_audio(SAMPLE)
    assert answer["duration"] == pytest.approx(seconds, abs=0.001)
    assert answer["seconds_per_code"] == 0.08
    tokenizer = kimi_mm.load("nano").tokenizer
    for piece in answer["pieces"]:
        start, end = round(piece["start"] * 16_000), round(piece["end"] * 16_000)
        assert piece["codes"] == tokenizer.encode(wave[start:end], 16_000).codes.tolist()
    refused = requests.post(f"{nano.url}/v1/audio/codes", files={"file": b"no sound"}, timeout=20)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_segments_come_with_a_stream_that_asks_for_times(nano):
    options = {"model": "nano", "file": ("clip.flac", SAMPLE.read_bytes()), "stream": True}
    plain = list(nano.client().audio.transcriptions.create(**options))
    timed = list(nano.client().audio.transcriptions.create(**options, timestamp_granularities=["segment"]))
    spans = [event for event in timed if event.type == "transcript.text.segment"]
    assert [event.type for event in plain] == [event.type for event in timed if event not in spans]
    assert " ".join(event.text for event in spans) == timed[-1].text == plain[-1].text
    assert [int(event.id) for event in spans] == list(range(len(spans)))
    assert all(0 <= event.start < event.end for event in spans)


def test_a_file_is_heard_drawn_and_played(browser, nano):
    browser.open(nano.url)
    browser.ready()
    browser.at("#files").send_keys(str(CLIPS / CLIP["file"]))
    text = browser.heard()
    assert (
        text
        == nano.client()
        .audio.transcriptions.create(file=("c.flac", (CLIPS / CLIP["file"]).read_bytes()), model="nano")
        .text
    )
    assert browser.at(".turn .name").text == CLIP["file"]
    assert browser.at(".segment .time").text == "0:00.0"
    assert (
        0 < float(browser.at(".first").text.removesuffix(" s")) <= float(browser.at(".total").text.removesuffix(" s"))
    )
    browser.until(lambda: "codes" in browser.at(".axis").text)
    for canvas in ("wave", "mel", "codes"):
        shades = browser.driver.execute_script(
            "const c = document.querySelector('.turn .' + arguments[0]);"
            "const {data} = c.getContext('2d').getImageData(0, 0, c.width, c.height);"
            "return new Set(new Uint32Array(data.buffer)).size",
            canvas,
        )
        assert shades > 10, canvas
    browser.at(".lanes").click()
    browser.until(lambda: float(browser.at(".lanes").get_attribute("aria-valuenow")) > CLIP["seconds"] / 2)
    browser.until(lambda: browser.at(".play").get_attribute("aria-label") == "Pause")
    browser.at(".play").click()
    browser.until(lambda: browser.at(".play").get_attribute("aria-label") == "Play")
    assert browser.complaints() == []


def test_texts_are_saved_as_the_server_writes_them(browser, nano):
    browser.open(nano.url)
    browser.ready()
    browser.at("#sample").click()
    browser.heard()
    options = {"file": ("sample.flac", SAMPLE.read_bytes()), "model": "nano"}
    for ending, form in (("txt", "text"), ("srt", "srt")):
        browser.at(f".{ending}").click()
        path = browser.saved / f"sample.{ending}"
        browser.until(lambda path=path: path.is_file() and path.stat().st_size)
        expected = nano.client().audio.transcriptions.create(**options, response_format=form)
        assert path.read_text(encoding="utf-8").strip() == expected.strip()
    browser.at(".remove").click()
    assert not browser.all(".turn")
    assert browser.at("#nothing").is_displayed()


def test_dropped_files_are_heard_in_turn_whatever_they_are(browser, nano, tmp_path):
    av = pytest.importorskip("av", reason="needs the extra 'video'")
    wave, rate = soundfile.read(SAMPLE, dtype="float32")
    with av.open(str(tmp_path / "spoken.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.rate = rate
        container.mux([*stream.encode(frame), *stream.encode(None)])
    refused = requests.post(
        f"{nano.url}/v1/audio/codes", files={"file": (tmp_path / "spoken.m4a").read_bytes()}, timeout=20
    )
    assert refused.status_code == 400  # the server cannot read it: the page makes a WAV of it
    browser.open(nano.url)
    browser.ready()
    encoded = base64.b64encode((tmp_path / "spoken.m4a").read_bytes()).decode()
    browser.driver.execute_async_script(
        """
        const done = arguments[1];
        const held = new DataTransfer();
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        held.items.add(new File([bytes], "spoken.m4a"));
        fetch("/static/sample.flac").then((answer) => answer.blob()).then((blob) => {
          held.items.add(new File([blob], "second.flac"));
          window.dispatchEvent(new DragEvent("drop", { dataTransfer: held, bubbles: true, cancelable: true }));
          done();
        });
        """,
        encoded,
    )
    browser.until(lambda: len(browser.all(".times:not([hidden])")) == 2)
    assert [name.text for name in browser.all(".name")] == ["second.flac", "spoken.m4a"]
    texts = [words(text.text) for text in browser.all(".text")]
    assert len(set(texts[0]) & set(texts[1])) > 4
    assert browser.complaints() == []


def test_the_microphone_is_heard(browser, nano):
    browser.open(nano.url)
    browser.ready()
    browser.at("#record").click()
    browser.until(lambda: browser.at("#record").text == "Stop" or browser.all("body.recording"))
    browser.until(lambda: int(browser.at("#level").get_attribute("aria-valuenow")) > 10)
    end = int(CLIP["seconds"] + 1)
    browser.until(lambda: browser.at("#clock").text == f"0:{end:02d}")
    browser.at("#record").click()
    text = browser.heard()
    assert word_error_rate([CLIP["text"]], [text], draws=0).rate < 0.7, text
    assert browser.at(".turn .name").text == "Recording 1"
    assert browser.complaints() == []


def test_keys_alone_record_and_discard(browser, nano):
    from selenium.webdriver.common.keys import Keys

    browser.open(nano.url)
    browser.ready()
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    reached = [browser.driver.switch_to.active_element]
    for _ in range(5):
        reached[-1].send_keys(Keys.TAB)
        reached.append(browser.driver.switch_to.active_element)
    assert [element.get_attribute("id") or element.get_attribute("class") or element.text for element in reached] == [
        "skip",
        "Transcribe",
        "Talk",
        "record",
        "choose",
        "sample",
    ]
    assert browser.driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", reached[-1]) == "solid"
    browser.at("#record").send_keys(Keys.ENTER)
    browser.until(lambda: browser.all("body.recording"))
    browser.at("#record").send_keys(Keys.ESCAPE)
    browser.until(lambda: browser.at("#status").get_attribute("textContent") == "Discarded")
    assert not browser.all("body.recording, .turn")


def test_a_phone_has_nothing_to_scroll_sideways(browser, nano):
    browser.open(nano.url, 360, 740, dark=True)
    browser.ready()
    browser.at("#sample").click()
    assert len(words(browser.heard())) > 4
    browser.until(lambda: "codes" in browser.at(".axis").text)
    assert browser.overflow() == 0
    assert browser.complaints() == []


def test_errors_are_the_servers_own(browser, nano, tmp_path):
    (tmp_path / "notes.wav").write_bytes(b"these are no samples")
    browser.open(nano.url)
    browser.ready()
    browser.at("#files").send_keys(str(tmp_path / "notes.wav"))
    browser.until(lambda: browser.at(".turn article > .fault").text)
    answer = requests.post(
        f"{nano.url}/v1/audio/transcriptions",
        files={"file": b"these are no samples"},
        data={"model": "nano"},
        timeout=20,
    )
    assert browser.at(".turn article > .fault").text.lower() == answer.json()["error"]["message"].lower()
    browser.complaints()  # the browser notes the status 400


def test_a_key_is_asked_for(browser, tiny):
    browser.open(tiny.url)
    browser.until(lambda: browser.at("#key-form").is_displayed())
    for key, fault in (("wrong", "The API key is wrong."), (KEY, "")):
        browser.at("#key").clear()
        browser.at("#key").send_keys(key)
        browser.at("#key-form button").click()
        if fault:
            browser.until(lambda fault=fault: browser.at("#key-fault").text == fault)
    browser.ready()
    assert "able" in browser.at("#model").text
    assert not browser.at("#key-form").is_displayed()
    browser.complaints()  # the browser notes the status 401
