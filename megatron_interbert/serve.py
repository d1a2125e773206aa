"""Serve product search and recommendation over HTTP: `interbert serve --load RUN --data-path S`."""

import logging

from megatron_interbert.command_line import parse
from megatron_interbert.errors import imports_of, run_entry
from megatron_interbert.parallel.device import this_device
from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.hosts import AllowedHosts
from megatron_interbert.serving.log_limit import Allowance, LimitedHandler
from megatron_interbert.tasks.precision import settle_precision

REQUEST_LINES = Allowance(200, 1.0)  # in the log


def run() -> None:
    """Parse the flags, open the service and run it until SIGTERM or SIGINT."""
    config = parse(ServeConfig, ServeConfig.__doc__ or "")
    config.check()

    with imports_of("serve", "the service"):
        from megatron_interbert.serving.server import serve

    hosts = AllowedHosts.of(config.host, config.allowed_hosts)
    handler = LimitedHandler({"megatron_interbert.serving.requests": REQUEST_LINES})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=[handler])
    device = this_device()
    with settle_precision(config, device).products():
        serve(config, device, hosts)


def main() -> None:
    """Run the entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
