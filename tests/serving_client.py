"""A service in a process of its own, as users start it, for tests that talk to it."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request

from tests.launching import ENVIRONMENT, ROOT, until

KEY = "a key of tests"


class Service:
    """`with Service(flags) as service`: service.url, service.call(method, path, body); ends with SIGTERM.

    `through` may wrap the command, for limits of that process alone.
    """

    def __init__(self, *flags, key=KEY, through=list):
        command = [sys.executable, "-m", "megatron_interbert.serve", "--port", "0", *map(str, flags)]
        self.process = subprocess.Popen(
            through(command),
            cwd=ROOT,
            env={**ENVIRONMENT, "INTERBERT_API_KEY": key},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.lines = {"stdout": [], "stderr": []}
        for name, lines in self.lines.items():
            threading.Thread(
                target=lambda pipe, to: to.extend(pipe), args=(getattr(self.process, name), lines), daemon=True
            ).start()
        self.key, self.url = key, ""

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
        """(status, answer as JSON or bytes, headers)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        given = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=given)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text, found = response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            status, text, found = error.code, error.read(), error.headers
        return status, json.loads(text) if text and "json" in found.get("content-type", "") else text, found

    def search(self, query, **more):
        """Item ids and scores of a query."""
        status, answer, _ = self.call("POST", "/search", {"query": query, **more})
        assert status == 200, answer
        return [(item["item_id"], item["score"]) for item in answer["results"]]
