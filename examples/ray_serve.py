"""Replicas of the server behind one address: `pip install 'kimi-mm[serve,ray]'`, `python examples/ray_serve.py`.

    askers ─► Ray's proxy ─► the replica with the fewest open requests ─► what `kimi-mm serve` does, in its own process

Each replica has its own model and engine. On a cluster Ray spreads them over its machines; `--gpus 1` gives each a GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading

import ray
from ray import serve

import kimi_mm
from kimi_mm.serving.app import create_app
from kimi_mm.serving.service import Service
from kimi_mm.serving.settings import ServeConfig


@serve.ingress()
class Replica:
    """One model behind OpenAI's API."""

    def __init__(self, config: ServeConfig, api_key: str | None) -> None:
        self.service = Service.of(kimi_mm.load(config.model, config.device), config)
        self.api_key = api_key

    def __serve_build_asgi_app__(self):
        return create_app(self.service, self.api_key)


def start(config: ServeConfig, replicas: int = 2, cpus: float = 1, gpus: float = 0, api_key: str | None = None) -> None:
    """Starts replicas behind `config.host` and `config.port`; returns when they answer."""
    deployment = serve.deployment(
        Replica,
        num_replicas=replicas,
        # What waits beyond this stays with the proxy, where another replica may take it.
        max_ongoing_requests=config.max_requests + config.max_waiting,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(deployment.bind(config, api_key), name="kimi-mm", route_prefix="/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="of each replica")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()

    ray.init(include_dashboard=False)  # or joins the cluster that RAY_ADDRESS names
    config = ServeConfig(model=given.model, device="cuda" if given.gpus else "cpu", port=given.port)
    start(config, given.replicas, given.cpus, given.gpus, os.environ.get("KIMI_MM_API_KEY"))
    print(f"{given.replicas} replicas are ready at http://{config.host}:{config.port}", flush=True)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
