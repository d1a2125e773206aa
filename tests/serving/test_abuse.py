"""Test abuse of the service: a fuzzed schema, made-up requests, many slow clients.

There must be no 5xx except 503, and no hang.
"""

import socket
import subprocess
import sys
import time

import pytest

from tests.campaigns.requests import campaign
from tests.launching import ENVIRONMENT
from tests.serving.made_shop import flags
from tests.serving_client import KEY, Service


@pytest.fixture(scope="module")
def service(shop, tmp_path_factory):
    with Service(
        *flags(shop, tmp_path_factory.mktemp("index") / "index", "--deadline", 20)
    ) as running:
        yield running


def unharmed(service):
    """Check that the service answers as before and has logged nothing that it should not."""
    assert len(service.search("红色", k=3)) == 3
    log = "".join(service.lines["stderr"])
    for word in ("Traceback", KEY, "passwd", "红色", "<script>"):
        assert word not in log, log[log.index(word) - 300 :][:900]


def test_made_up_requests(service):
    """Run a short form of tests/campaigns/requests.py."""
    found = campaign(service.url, 1000, 7, KEY)
    assert found[200] > 20
    assert found[422] > 200
    unharmed(service)


def test_the_schema_is_true(service, tmp_path):
    """Check with schemathesis that what the schema allows is answered as it says, that what it
    forbids is refused, and that nothing is a server error.
    """
    pytest.importorskip(
        "schemathesis", reason="schemathesis is not installed (pip install -r requirements.txt)"
    )
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{service.url}/openapi.json",
        "--max-examples",
        "15",
        "--seed",
        "1",
        "--header",
        f"Authorization: Bearer {KEY}",
        "--suppress-health-check",
        "all",
        "--phases",
        "examples,coverage,fuzzing",
        "--checks",
        "not_a_server_error,response_schema_conformance,content_type_conformance,negative_data_rejection",
    ]

    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    unharmed(service)


def test_many_slow_clients_keep_nobody_waiting(service):
    """Check that others are answered while two hundred connections send their headers, or a body,
    byte by byte.
    """
    host, port = service.url.removeprefix("http://").split(":")
    lines = [socket.create_connection((host, int(port))) for _ in range(200)]
    head = (
        b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
        b" application/json\r\ncontent-length: 50\r\n\r\n"
    )
    for number, line in enumerate(lines):
        line.sendall(head if number % 2 else head[:20])

    started = time.monotonic()
    for _ in range(5):
        for line in lines:
            line.sendall(b"x")
        assert len(service.search("红色", k=3)) == 3

    assert time.monotonic() - started < 20
    for line in lines:
        line.close()

    unharmed(service)
