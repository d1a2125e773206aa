"""Run a service in a process of its own, for tests that talk to it."""

import json
import sys
import urllib.error
import urllib.request

from tests.launching import start, until

KEY = "a key of tests"


class Service:
    """Run a service: `with Service(flags) as service`: service.url, service.call(method, path,
    body); it is ended by SIGTERM.

    `files` limits how many descriptors it may open.
    """

    def __init__(self, *flags, key=KEY, files=None):
        command = (sys.executable, "-m", "megatron_interbert.serve", "--port", 0, *flags)
        self.process = start(*command, files=files, INTERBERT_API_KEY=key)
        self.lines = self.process.lines
        self.key = key
        self.url = ""

    def __enter__(self):
        def address():
            assert self.process.poll() is None, "".join(self.lines["stderr"])
            return next((line for line in self.lines["stdout"] if line.startswith("serving")), "")

        self.url = until(address, "the service listens", 120).split()[-1].rstrip("/")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def call(self, method, path, body=None, key=None, raw=None, headers=None):
        """Send a request; return (status, answer as JSON or bytes, headers)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        given = {
            "content-type": "application/json",
            **({"authorization": f"Bearer {key}"} if key else {}),
            **(headers or {}),
        }
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=given)

        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status = response.status
                text = response.read()
                found = response.headers
        except urllib.error.HTTPError as error:
            status = error.code
            text = error.read()
            found = error.headers

        return (
            status,
            json.loads(text) if text and "json" in found.get("content-type", "") else text,
            found,
        )

    def search(self, query, **more):
        """Search; return [(item id, score)]."""
        status, answer, _ = self.call("POST", "/search", {"query": query, **more})
        assert status == 200, answer
        return [(item["item_id"], item["score"]) for item in answer["results"]]
