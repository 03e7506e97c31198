"""Examples that talk to a server, and replicas of it behind Ray Serve."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests

from kimi_mm.cli.demo import CLIPS, read_clips

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_openai_client(nano, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "openai_client.py"],
        cwd=tmp_path,
        env={**os.environ, "OPENAI_BASE_URL": f"{nano.url}/v1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("press one now") == 4  # whole, streamed, in subtitles, in a chat
    assert re.search(r"\(\d+ positions read, \d+ written\)", done.stdout)


@pytest.mark.slow
def test_two_replicas_behind_ray(tmp_path):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray keeps sockets below its folder, whose names must be short, and a token in the home folder.
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "ray_serve.py"), "--replicas", "2", "--cpus", "0.5", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    log: list[str] = []
    limit = threading.Timer(180, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if "replicas are ready" in line:
                break
        assert "2 replicas are ready" in log[-1], "".join(log)
        threading.Thread(target=lambda: log.extend(process.stdout or ()), daemon=True).start()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        clips = [CLIPS / clip["file"] for clip in read_clips()[:3]]

        def hear(clip: Path) -> str:
            return client.audio.transcriptions.create(file=clip, model="nano").text

        with ThreadPoolExecutor(6) as pool:
            heard = list(pool.map(hear, clips * 4))
        assert heard == heard[:3] * 4
        assert len(set(heard)) == 3
        events = client.audio.transcriptions.create(file=clips[0], model="nano", stream=True)
        assert sum(event.type == "transcript.text.delta" for event in events) > 2
        with pytest.raises(openai.BadRequestError, match="not a sound file"):
            client.audio.transcriptions.create(file=("a.wav", b"no sound"), model="nano")
        counts = set()
        for _ in range(60):  # each replica counts for itself
            page = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text
            found = re.search(r'requests_total\{route="/v1/audio/transcriptions",status="200"\} (\S+)', page)
            counts.add(float(found[1]) if found else 0.0)
        assert len(counts) == 2, counts
        assert sum(counts) == 13
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            limit.cancel()
            process.kill()
