"""Product search and recommendation over HTTP: `python -m megatron_interbert.serve --load RUN --data-path STORE`."""

import logging

import uvicorn

from megatron_interbert.command_line import parse
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.parallel.state import this_device
from megatron_interbert.serving.app import make_app
from megatron_interbert.serving.start import Opened, open_service
from megatron_interbert.task_config import ServeConfig


def run() -> None:
    """Parse, open, serve until SIGTERM or SIGINT."""
    config = parse(ServeConfig, ServeConfig.__doc__ or "")
    config.check()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    opened = Opened(config, this_device())
    if config.build_only:
        print(f"index {opened.build()} of {opened.folder}")
        return
    app = make_app(open_service(config, opened))
    server = uvicorn.Server(
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
    host, port = listening.getsockname()[:2]
    print(f"serving {len(app.state.service.model.shop.items)} items at http://{host}:{port}/", flush=True)
    server.run(sockets=[listening])


def main() -> None:
    """Entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
