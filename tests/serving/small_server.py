"""Run the service's server and guard around a small application, so that no model is needed."""

import contextlib
import socket
import threading
from types import SimpleNamespace

from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.connections import Crowd
from megatron_interbert.serving.guard import Guard
from megatron_interbert.serving.hosts import AllowedHosts
from megatron_interbert.serving.server import Server, server_config
from tests.launching import until


@contextlib.contextmanager
def small_server(answer, **settings):
    """Run a server in a thread with the application `answer(scope, receive, send)`; yield (url,
    crowd).
    """
    config = ServeConfig(load="none", **settings)
    crowd = Crowd(config)
    counted = []
    guard = Guard(
        answer,
        config,
        AllowedHosts.of("127.0.0.1", ""),
        crowd,
        lambda *figures: counted.append(figures),
    )

    async def app(scope, receive, send):
        await guard(scope, receive, send)

    app.state = SimpleNamespace(
        service=SimpleNamespace(searcher=SimpleNamespace(shop=SimpleNamespace(items=[])))
    )
    server = Server(server_config(config, app, crowd), crowd)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = "http://{}:{}".format(*listening.getsockname())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        try:
            until(lambda: server.started, "the server has started")
            yield url, crowd
        finally:
            server.should_exit = True
            thread.join()
