"""A server on loopback that speaks as much of the hub's API as huggingface_hub asks for, and fails when told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".pt")  # kept by SHA-256; other files as git keeps them


@dataclass
class Hub:
    """Repositories by name, and what is to go wrong with a file (by its path "owner/name/file")."""

    repositories: dict[str, Path]
    cut: dict[str, int] = field(default_factory=dict)  # once: the connection ends after so many bytes
    gone_after: str = ""  # from the time that it was cut: 503
    flip: set[str] = field(default_factory=set)  # once: the last byte is another one
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20

            def do_GET(self) -> None:
                answer(hub, self)

            def do_HEAD(self) -> None:
                answer(hub, self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self, method: str = "GET") -> list[tuple[str, str]]:
        """Path below its repository and Range of every request for a file."""
        found = []
        for kind, path, span in self.requests:
            if kind == method and "/resolve/" in path:
                found.append((path.split(f"/resolve/{COMMIT}/")[1], span))
        return found


def identifier(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix in LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    path, span = unquote(urlsplit(request.path).path), request.headers.get("Range", "")
    hub.requests.append((request.command, path, span))
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main|/tree/\w+)?", path):
        folder = hub.repositories.get(match[1])
        if folder is None:
            send(request, 404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        entries = [entry(folder, file) for file in files]
        listed = [{"rfilename": item["path"]} for item in entries]
        about = {"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": listed, "tags": [], "private": False}
        send(request, 200, json.dumps(entries if "/tree/" in path else about).encode())
    elif match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:main|{COMMIT})/(.+)", path):
        folder = hub.repositories.get(match[1])
        file = None if folder is None else folder / match[2]
        if file is None or not file.is_file():
            send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            send_file(hub, request, f"{match[1]}/{match[2]}", file, span)
    else:
        send(request, 404, b"")


def entry(folder: Path, file: Path) -> dict:
    size, oid = file.stat().st_size, identifier(file)
    found = {"type": "file", "oid": oid[:40], "size": size, "path": str(file.relative_to(folder))}
    return found | ({"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if file.suffix in LARGE else {})


def send_file(hub: Hub, request: BaseHTTPRequestHandler, name: str, file: Path, span: str) -> None:
    data, status = file.read_bytes(), 200
    headers = {"ETag": f'"{identifier(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
    if request.command == "GET" and name == hub.gone_after and name not in hub.cut:
        send(request, 503, b"")
        return
    if request.command == "GET" and name in hub.flip:
        hub.flip.discard(name)
        data = data[:-1] + bytes([data[-1] ^ 1])
    if match := re.fullmatch(r"bytes=(\d+)-", span):
        start, status = int(match[1]), 206
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        data = data[start:]
    keep = hub.cut.pop(name, None) if request.command == "GET" else None
    send(request, status, data, headers, keep)


def send(
    request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict | None = None, keep: int | None = None
) -> None:
    request.send_response(status)
    for key, value in (headers or {}).items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command == "HEAD":
        return
    request.wfile.write(data if keep is None else data[:keep])
    if keep is not None:
        request.wfile.flush()
        request.close_connection = True
