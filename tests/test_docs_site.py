"""The documentation builds as a site without a warning, has every page, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="needs the extra 'docs'")
pytest.importorskip("mkdocstrings", reason="needs the extra 'docs'")

ROOT = Path(__file__).resolve().parents[1]
# What a browser fetches by itself.
FETCHED = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)\"|<link[^>]*\shref=\"([^\"]+)\"")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_page_is_there(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").is_file(), page
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert (site / recipe.relative_to(ROOT).with_suffix("") / "index.html").is_file(), recipe
    assert "on two CPU cores and offline it transcribes" in text(site / "index.html")
    assert "WER %" in text(site / "kimi_mm/pretrained/nano/index.html")


def test_the_api_is_described_from_its_docstrings(site):
    page = text(site / "api/index.html")
    assert 'id="kimi_mm.pipeline.KimiMM.transcribe"' in page
    assert "A silent recording has no segments." in page


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = ["".join(found) for found in FETCHED.findall(text(page))]
        assert fetched
        assert not [address for address in fetched if re.match(r"(?:https?:)?//", address)], page
        if page.name != "404.html":  # whose addresses count from the site's root
            assert [address for address in fetched if not (page.parent / address.split("?")[0]).exists()] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", text(sheet)), sheet
