"""Every knob of the server, with defaults that suit two CPU cores and the shipped model."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mm.config_base import Config, positive


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Limits, time-outs in seconds, and who may ask."""

    model: str = "nano"  # a shipped model's name or a checkpoint folder
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None  # of torch on a CPU; None leaves one core to the handlers
    # Who may ask. Loopback names, IP addresses and `host` itself are always known; "*" allows any name or origin.
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    # How much.
    max_body_mib: int = 32
    max_bodies_mib: int = 256  # of all requests together
    max_audio_seconds: float = 7200.0
    max_prompt: int = 8192  # positions of a conversation; a second of sound has 12.5
    # How many at a time. Beyond `max_requests` they wait, beyond `max_waiting` they get 429.
    max_requests: int = 16
    max_waiting: int = 32
    max_rows: int = 16  # that decode together
    cache_mib: int = 1024  # for their caches
    reuse_mib: int = 128  # for states kept from turn to turn of a conversation
    max_connections: int = 512
    max_sessions: int = 8  # of /v1/realtime
    # How long.
    header_seconds: float = 10.0  # for the request line and headers
    body_seconds: float = 20.0  # between two pieces of a body
    upload_seconds: float = 120.0  # for a whole body
    read_seconds: float = 60.0  # for a client to take some of what is sent
    request_seconds: float = 300.0  # from the whole body to the end of the answer
    shutdown_seconds: int = 20
    session_seconds: float = 3600.0  # for a session of /v1/realtime
    silent_seconds: float = 300.0  # between two events of its client
    turn_seconds: float = 120.0  # for what is said in one go

    def __post_init__(self) -> None:
        positive(self.replace(port=1) if self.port == 0 else self)  # port 0 takes a free one
