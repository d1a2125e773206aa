"""Open the models, bind the address and run uvicorn until told to end."""

import asyncio
import functools
import logging
import socket

import torch
import uvicorn
from fastapi import FastAPI

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.app import make_app
from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.connections import (
    ACCEPTED_AT_ONCE,
    Connection,
    Crowd,
    fit_connections,
)
from megatron_interbert.serving.hosts import AllowedHosts
from megatron_interbert.serving.start import open_models, open_service

WAITING_TO_BE_ACCEPTED = 1024  # connections that the kernel queues


class Server(uvicorn.Server):
    """Serve: print the address once it listens, close connections that are out of time, and shut
    down once the requests under way are finished.
    """

    def __init__(self, config: uvicorn.Config, crowd: Crowd) -> None:
        super().__init__(config)
        self.crowd = crowd

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio uses one number both for this and for ACCEPTED_AT_ONCE
        sockets[0].listen(WAITING_TO_BE_ACCEPTED)
        host, port = sockets[0].getsockname()[:2]
        items = len(self.config.app.state.service.searcher.shop.items)
        print(f"serving {items} items at http://{host}:{port}/", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:  # every half second
            self.crowd.look(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asking = asyncio.create_task(self._ask_to_end())
        try:
            await super().shutdown(sockets)
        finally:
            asking.cancel()

    async def _ask_to_end(self) -> None:
        """Ask all connections to close, again and again: uvicorn asks once, and would wait for one
        accepted at that moment until the time is up.
        """
        while True:
            await asyncio.sleep(0.2)
            self.crowd.look(asyncio.get_running_loop().time())
            for connection in list(self.server_state.connections):
                connection.shutdown()


def serve(config: ServeConfig, device: torch.device, hosts: AllowedHosts) -> None:
    """Build the indexes (--build-only), or answer requests until told to end."""
    models = open_models(config, device)
    if not config.build_only:
        fit_connections(config)
    for note in dict.fromkeys(note for opened in models for note in opened.config.notes):
        logging.info(note)

    if config.build_only:
        for opened in models:
            print(f"index {opened.build()} of {opened.folder}")
        return

    service = open_service(config, models)
    logging.info(hosts.told())
    crowd = Crowd(config)
    server = Server(server_config(config, make_app(service, hosts, crowd), crowd), crowd)
    server.run(sockets=[bind(config.host, config.port)])


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to the service's address; raises UsageError with the system's reason."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)

    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, TypeError) as error:  # TypeError: letters that no host name has
        listening.close()
        reason = getattr(error, "strerror", None) or "not a host name"
        raise UsageError(
            f"--host {host} --port {port}: cannot listen at {host}:{port} ({reason}); give an"
            " address of this machine and a port that no other service uses"
        ) from None

    return listening


def server_config(config: ServeConfig, app: FastAPI, crowd: Crowd) -> uvicorn.Config:
    """Return uvicorn's configuration.

    Event loop and protocols are named, because by default installed packages would decide them.
    """
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        loop="asyncio",
        http=functools.partial(Connection, crowd),
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=config.keep_alive_timeout,
        timeout_graceful_shutdown=config.drain_seconds,
    )
