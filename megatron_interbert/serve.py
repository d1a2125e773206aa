"""Product search and recommendation over HTTP: `python -m megatron_interbert.serve --load RUN --data-path STORE`."""

import asyncio
import logging
import socket

import torch
import uvicorn

from megatron_interbert.command_line import parse
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.parallel.device import this_device
from megatron_interbert.serving.app import make_app
from megatron_interbert.serving.start import open_models, open_service
from megatron_interbert.task_config import ServeConfig
from megatron_interbert.tasks.precision import settle_precision


class Server(uvicorn.Server):
    """Says where it listens when it does, and ends when what is under way has ended."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        items = len(self.config.app.state.service.searcher.shop.items)
        print(f"serving {items} items at http://{host}:{port}/", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asking = asyncio.create_task(self._ask_to_end())
        try:
            await super().shutdown(sockets)
        finally:
            asking.cancel()

    async def _ask_to_end(self) -> None:
        """uvicorn asks connections once: one that is accepted in that moment would be waited for until the time is up."""
        while True:
            await asyncio.sleep(0.2)
            for connection in list(self.server_state.connections):
                connection.shutdown()


def run() -> None:
    """Parse, open, serve until SIGTERM or SIGINT."""
    config = parse(ServeConfig, ServeConfig.__doc__ or "")
    config.check()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    device = this_device()
    with settle_precision(config, device).products():
        serve(config, device)


def serve(config: ServeConfig, device: torch.device) -> None:
    """Build the indexes, or answer until told to end."""
    models = open_models(config, device)
    for note in dict.fromkeys(note for opened in models for note in opened.config.notes):
        logging.info(note)

    if config.build_only:
        for opened in models:
            print(f"index {opened.build()} of {opened.folder}")
        return
    app = make_app(open_service(config, models))
    server = Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=config.drain_seconds,
            h11_max_incomplete_event_size=32768,
        )
    )
    try:
        listening = server.config.bind_socket()
    except SystemExit:
        raise UsageError(f"--port {config.port}: cannot listen at {config.host}:{config.port}; is another service there?") from None
    server.run(sockets=[listening])


def main() -> None:
    """Entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
