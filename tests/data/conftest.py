"""Fixtures that several data tests share."""

import pytest

from kimi_mm.data.art import ART, Art
from tests.data.toy_art import write_toy_art


@pytest.fixture(scope="session")
def art_folder(tmp_path_factory):
    return write_toy_art(tmp_path_factory.mktemp("art"))


@pytest.fixture(scope="session")
def art(art_folder):
    return Art(art_folder / ART)
