"""Every operation of the server's own description, asked for what the description allows and for what it does not.

Requests are drawn from /openapi.json by schemathesis, the same ones each time. No answer may be a 5xx, and the status,
media type and body of every answer must be described.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import requests
import soundfile

pytest.importorskip("schemathesis", reason="needs the extra 'dev'")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving.conftest import Server

BUFFER = io.BytesIO()
soundfile.write(BUFFER, np.zeros(160), 16_000, format="WAV")
SOUND = BUFFER.getvalue()
# Each with the statuses that its requests must come to: what is never accepted is not tested.
OPERATIONS = {
    "GET /health": {200},
    "GET /metrics": {200, 401},
    "GET /v1/models": {200, 401},
    "GET /v1/models/{name}": {200, 401, 404},
    "POST /v1/audio/codes": {200, 400, 401},
    "POST /v1/audio/speech": {200, 400, 401},
    "POST /v1/audio/transcriptions": {200, 400, 401},
    "POST /v1/chat/completions": {200, 400, 401},
}
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# What is drawn, whether it is made sensible, and how often.
ROUNDS = [(POSITIVE, True, 25), (POSITIVE, False, 15), (NEGATIVE, False, 20)]


@pytest.fixture(scope="module")
def description(tiny) -> dict[str, Any]:
    answer = requests.get(f"{tiny.url}/openapi.json", headers={"Authorization": f"Bearer {tiny.key}"}, timeout=20)
    return answer.json()


def test_no_operation_is_forgotten(description):
    described = [f"{method.upper()} {path}" for path, item in description["paths"].items() for method in item]
    assert sorted(described) == list(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_are_as_described(tiny, description, operation):
    method, _, path = operation.partition(" ")
    described = schemathesis.openapi.from_dict(description)[path][method]
    met: Counter[int] = Counter()

    def ask(case: Case, sensible: bool) -> None:
        if sensible:
            make_sensible(case, tiny)
        answer = case.call(base_url=tiny.url, headers={"Authorization": f"Bearer {tiny.key}"}, timeout=20)
        met[answer.status_code] += 1
        # The description cannot say what a sound file is, nor which model is loaded.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    for mode, sensible, count in ROUNDS:
        if mode is NEGATIVE and operation == "GET /health":  # with which nothing can be wrong
            continue
        drawn = given(described.as_strategy(generation_mode=mode), st.just(sensible))
        same_each_time(count)(drawn(ask))()
    assert OPERATIONS[operation] <= set(met), met
    assert requests.get(f"{tiny.url}/health", timeout=20).status_code == 200


def same_each_time(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def make_sensible(case: Case, server: Server) -> None:
    """Gives a request what no description leads to: the loaded model's name, and something short to answer."""
    if "name" in (case.path_parameters or {}):
        case.path_parameters["name"] = server.model
    if not isinstance(case.body, dict):
        return
    values = {
        "model": server.model,
        "file": SOUND,
        "messages": [{"role": "user", "content": "red"}],
        "max_tokens": 3,
        "max_completion_tokens": 3,
        "input": "red dogs",
        "speed": 1.0,
        "instructions": "",
        "stream_format": "audio",
    }
    for field, value in values.items():
        if field in case.body:
            case.body[field] = value
