"""Test the limits on what one client may take from the others: connections, time, the log; and
ambiguous requests.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import re
import resource
import shutil
import socket
import sys
import threading
import time
from urllib.parse import quote

import h5py
import pytest

from tests.launching import launch, until
from tests.serving.made_shop import flags
from tests.serving.raw_client import connect, exchange, held, read_to_end, status_of
from tests.serving_client import Service

HEAD = b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HALF_BODY = HEAD + b'content-length: 50\r\n\r\n{"que'
GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def service(shop, tmp_path_factory):
    """Run a service with 256 descriptors and short time limits."""
    times = ("--header-timeout", 2, "--keep-alive-timeout", 1, "--body-seconds", 4)
    index = tmp_path_factory.mktemp("index") / "index"
    with Service(*flags(shop, index, *times), files=256) as running:
        yield running


def log_of(service):
    return "".join(service.lines["stderr"])


def figure(service, name):
    text = service.call("GET", "/metrics")[1].decode()
    return float(
        next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[-1]
    )


def answers(service):
    """Check that a well-behaved client is answered soon, and so are health checks."""
    started = time.monotonic()
    for _ in range(3):
        assert len(service.search("红色", k=3)) == 3
        assert service.call("GET", "/healthz")[0] == service.call("GET", "/readyz")[0] == 200

    assert time.monotonic() - started < 15


def test_the_limit_is_fitted_and_said(service):
    found = re.search(
        r"note: --max-connections (\d+) instead of 1000: the process may have 256 descriptors",
        log_of(service),
    )
    assert found, log_of(service)
    assert 40 < int(found[1]) < 128, "two descriptors for each"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /healthz HTTP/1.1\r\nhost: lo", HALF_BODY],
    ids=["nothing", "half headers", "half a body"],
)
def test_five_hundred_that_wait_keep_nobody_out(service, sent):
    before = len(log_of(service))
    with held(service.url, 500, sent):
        answers(service)
        assert figure(service, "interbert_connections") < 130

    answers(service)
    said = log_of(service)[before:]
    assert "out of system resource" not in said
    assert "Traceback" not in said
    assert len(said) < 100_000


def test_connections_come_and_go_and_none_is_kept(service):
    """Check two thousand connections in a row, silent or with half a request."""
    for _ in range(4):
        with held(service.url, 250):
            pass
        with held(service.url, 250, b"x"):
            pass

    until(lambda: figure(service, "interbert_connections") < 4, "all closed", 10)
    answers(service)


def dripped(service, before, pieces, pause=0.2):
    """Send pieces one by one; return (what came, seconds until the service closed)."""
    with connect(service.url) as line:
        line.sendall(before)
        started = time.monotonic()
        stop = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                for piece in pieces:
                    line.sendall(piece)
                    if stop.wait(pause):
                        return

        sender = threading.Thread(target=drip)
        sender.start()
        found = read_to_end(line)
        took = time.monotonic() - started
        stop.set()
        sender.join()

        return found, took


def test_headers_that_never_end(service):
    """Check headers sent byte by byte, line by line, and byte by byte in the second request of a
    connection.
    """
    header = [b"x-%d: y\r\n" % number for number in range(100)]
    cases = [(b"", [b"G"] * 100), (GET, header), (GET + b"\r\n", [b"G"] * 100)]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(lambda case: dripped(service, *case), cases))
    for found, took in results:
        assert found.count(b"HTTP/1.1 408 ") == 1, found
        assert b'{"error": "the headers took more than 2 s"}' in found
        assert 1.5 < took < 10


def test_connections_that_say_nothing_end(service):
    """Check that they are closed without an error: browsers keep such connections for later."""
    for sent, expected in ((b"", b""), (GET + b"\r\n", b"HTTP/1.1 200 OK")):
        started = time.monotonic()
        found = exchange(service.url, sent, 10)
        assert found.split(b"\r\n")[0] == expected
        assert time.monotonic() - started < 8


def test_a_body_that_is_left_unread_has_its_time_too(service):
    """Check that the 404 comes before the body, which is not awaited forever."""
    found, took = dripped(
        service,
        b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n",
        [b"x"] * 100,
    )
    assert found.startswith(b"HTTP/1.1 404")
    assert took < 10


CHUNKED = b"transfer-encoding: chunked\r\n"
CHUNKS = b'e\r\n{"query": "a"}\r\n0\r\n\r\n'
SMUGGLED = b"GET /topics HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "error"),
    [
        (
            HEAD + b"content-length: 14\r\n" + CHUNKED + b"\r\n" + CHUNKS,
            400,
            "both content-length and transfer-encoding",
        ),
        (
            HEAD + CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
            400,
            "both content-length and transfer-encoding",
        ),
        (HEAD + b"Content-Length : 4\r\n\r\n", 400, "not a valid HTTP request"),
        (HEAD + b"content-length: 4\r\ncontent-length: 5\r\n\r\n", 400, "not a valid HTTP request"),
        (
            HEAD.replace(b"/1.1", b"/1.0") + CHUNKED + b"\r\n" + CHUNKS,
            400,
            "transfer-encoding in HTTP/1.0",
        ),
        (HEAD + b"transfer-encoding: gzip\r\n\r\n", 501, "a transfer-encoding other than chunked"),
        (
            HEAD + CHUNKED + CHUNKED + b"\r\n" + CHUNKS,
            501,
            "a transfer-encoding other than chunked",
        ),
        (b"GET /healthz HTTP/1.1\nhost: localhost\n\n", 400, "LF alone"),
        (GET + b"x: y\n\r\n", 400, "LF alone"),
        (GET + b"x: y\nz: content\r\n\r\n", 400, "LF alone"),
        (b"\n" + GET + b"\r\n", 400, "LF alone"),
        (GET + b"host: localhost\r\n\r\n", 400, "not a valid HTTP request"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "not a valid HTTP request"),
        (GET + b"x: " + b"y" * 40_000, 431, "headers of more than 32768 bytes"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "not a valid HTTP request"),
        (b"\x00" * 100, 400, "not a valid HTTP request"),
        (HEAD + CHUNKED + b"\r\nzz\r\n", 400, "not a valid HTTP request"),
    ],
)
def test_requests_that_can_be_read_in_two_ways(service, sent, status, error):
    """Check that there is one answer, whatever follows, and that the connection is closed."""
    found = exchange(service.url, sent, 1.9)
    assert status_of(found) == status, found
    assert found.count(b"HTTP/1.1 ") == 1, found
    assert b"connection: close\r\n" in found
    assert found.split(b"\r\n\r\n")[1].startswith(b'{"error": "')
    assert error.encode() in found


def test_nor_in_a_later_request_of_a_connection(service):
    for wrong in (
        b"GET /topics HTTP/1.1\nhost: localhost\n\n",
        HEAD + b"content-length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED,
    ):
        found = exchange(service.url, GET + b"\r\n" + wrong, 1.9)
        assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", found)] == [
            200,
            400,
        ], found

    assert figure(service, 'interbert_connections_ended_total{reason="malformed"}') >= 19


def test_line_feeds_and_lengths_where_they_may_be(service):
    """Check a body of many lines, whole and in pieces, chunks, and a request sent byte by byte."""
    body = b'{\n"query":\n\n"\xe7\xba\xa2",\n\r\n"k": 3\n}\n'
    whole = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    chunks = (
        b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:]))
        + b"0\r\n\r\n"
    )

    for pieces in (
        [whole],
        [whole[:-10], whole[-10:]],
        [bytes([byte]) for byte in whole],
        [HEAD + b"connection: close\r\n" + CHUNKED + b"\r\n" + chunks],
    ):
        with connect(service.url) as line:
            for piece in pieces:
                line.sendall(piece)
            assert status_of(read_to_end(line)) == 200, pieces


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "localhost:",
        "127.0.0.1",
        "127.0.0.1:1",
        "[::1]",
        "[0:0::1]:8080",
        socket.gethostname(),
    ],
)
def test_hosts_that_are_ours(service, host):
    assert (
        status_of(
            exchange(
                service.url,
                b"GET /readyz HTTP/1.1\r\nconnection: close\r\nhost: %s\r\n\r\n" % host.encode(),
            )
        )
        == 200
    )


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "EVIL.example:8080",
        "localhost.evil.example",
        "evil.example@localhost",
        "localhost@evil.example",
        "10.0.0.1",
        "[::2]",
        "127.0.0.1.nip.io",
        "",
        "local host",
        "localhost:80:80",
        "[::1",
        "::1",
        "localhost..",
        "2130706433",
        "localhost/",
        "\xff",
        "a" * 9000,
    ],
)
@pytest.mark.parametrize("path", ["/", "/search", "/healthz"])
def test_hosts_that_are_not(service, host, path):
    sent = (
        f"{'POST' if path == '/search' else 'GET'} {path} HTTP/1.1\r\nhost:"
        f" {host}\r\ncontent-length: 2\r\n\r\n{{}}"
    )
    found = exchange(service.url, sent.encode("latin-1"), 1.9)
    assert status_of(found) == 400
    assert (
        b'{"error":"Host: not a name of this service; start it with --allowed-hosts NAME"}' in found
    )
    assert b"evil" not in found


def test_a_wrong_host_is_counted_and_http_1_0_may_have_none(service):
    counted = 'interbert_requests_total{route="other",status="400"}'
    before = figure(service, counted)
    exchange(service.url, b"GET / HTTP/1.1\r\nhost: evil.example\r\n\r\n")
    assert figure(service, counted) == before + 1
    assert status_of(exchange(service.url, b"GET /healthz HTTP/1.0\r\n\r\n")) == 200
    assert (
        status_of(exchange(service.url, b"GET /healthz HTTP/1.0\r\nhost: evil.example\r\n\r\n"))
        == 400
    )
    assert "evil" not in log_of(service)


GETS = (
    "/",
    "/page/page.js",
    "/page/page.css",
    "/topics",
    "/items/test-000001",
    "/pictures/test-000001",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/items/none",
    "/pictures/none",
    "/page/none",
    "/nothing",
)


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_a_body(service, path):
    status, _, headers = service.call("GET", path)
    found, nothing, short = service.call("HEAD", path)
    assert (found, nothing) == (status, b"")
    assert short["content-type"] == headers["content-type"]
    assert short["content-length"]
    if path != "/metrics":
        assert short["content-length"] == headers["content-length"]

    assert status in (200, 404)


def test_head_where_there_is_no_get_and_the_schema(service):
    assert service.call("HEAD", "/search")[0] == 405
    schema = service.call("GET", "/openapi.json")[1]
    assert not [path for path, methods in schema["paths"].items() if "head" in methods]
    found = exchange(
        service.url,
        b"HEAD /topics HTTP/1.1\r\nhost: localhost\r\n\r\n" + GET + b"connection: close\r\n\r\n",
    )
    assert found.count(b"HTTP/1.1 200 OK") == 2, "the second answer begins where the first ends"
    assert found.endswith(b'{"status":"alive"}')


ODD = [
    "a" * 255,
    "a" * 256,
    "a" * 300,
    "长" * 100,
    "a" * 20_000,
    "%00",
    "%ff%fe",
    "..",
    "a%2f..%2fb",
    "a/" * 200,
    "%0d%0ax:y",
    "%25s%25n",
    "C:%5c",
]


@pytest.mark.parametrize("route", ["/pictures/", "/items/", "/page/"])
def test_ids_of_any_length_and_any_characters(service, route):
    for name in ODD:
        for method in (b"GET", b"HEAD", b"DELETE"):
            path = route.encode() + b"".join(
                b"%%%02x" % byte if byte > 126 else bytes([byte]) for byte in name.encode()
            )
            found = exchange(
                service.url,
                method + b" " + path + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
            )
            assert status_of(found) in (401, 404, 405), (method, name, found[:200])


def test_no_more_descriptors_than_now_fill_no_log(service):
    """Check that if the process's limit falls while it serves, the log has few lines, not
    megabytes, and that once there are descriptors again all is as before.
    """
    process = service.process.pid
    soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    until(lambda: figure(service, "interbert_connections") < 4, "all closed", 10)
    before = len(log_of(service))

    with held(service.url, 1):
        resource.prlimit(process, resource.RLIMIT_NOFILE, (8, hard))
        try:
            with held(service.url, 120):
                time.sleep(2)
        finally:
            resource.prlimit(process, resource.RLIMIT_NOFILE, (soft, hard))

    until(lambda: service.call("GET", "/healthz")[0] == 200, "it answers again", 10)
    answers(service)
    said = log_of(service)[before:]
    assert 1 <= said.count("out of system resource") <= 3, "the rest is told after a minute"
    assert len(said) < 40_000


def test_lines_of_requests_are_counted_when_they_are_too_many(service):
    """Check that each of 1,500 requests has its line or is counted in one, and that no second has
    more than 500 lines.
    """
    time.sleep(1.1)
    before = len(log_of(service))
    began = time.monotonic()
    with connect(service.url) as line:
        line.sendall((GET + b"\r\n") * 1499 + GET + b"connection: close\r\n\r\n")
        assert read_to_end(line).count(b"HTTP/1.1 200 OK") == 1500
    seconds = math.floor(time.monotonic() - began) + 1  # a slow machine may take more than three

    def told():
        """Return the number of requests that have a line, and of those counted in one."""
        log = log_of(service)[before:]
        counts = re.findall(r"\.\.\. (\d+) more like this in 1 s: GET /healthz 200", log)
        return log.count("GET /healthz 200") - len(counts), sum(map(int, counts))

    until(lambda: sum(told()) == 1500, "all lines, or their number", 10)
    assert told()[0] <= 500 * seconds


def test_limits_that_cannot_be_kept_are_refused(shop, tmp_path):
    """Check this if the number was given, or too few connections are left; the error says what to
    do.
    """
    command = (
        sys.executable,
        "-m",
        "megatron_interbert.serve",
        "--port",
        0,
        *flags(shop, tmp_path / "index"),
    )

    for most, more in ((256, ("--max-connections", 200)), (82, ()), (80, ("--max-connections", 8))):
        code, out, err = launch(*command, *more, files=most, warm=False, timeout=60)
        assert code == 2, out + err
        last = err.strip().splitlines()[-1]
        assert re.match(
            r"error: --max-connections \d+( \(default\))?: needs \d+ descriptors, but", last
        ), err
        assert re.search(r"; raise the limit \(ulimit -n \d+\)( or give at most \d+)?$", last), err
        assert "Traceback" not in err


def rename_images(store, names):
    """Rename the first images of a store with one shard."""
    path = store / "shard-00000.h5"
    manifest = json.loads((store / "manifest.json").read_text())
    with h5py.File(path, "r+") as shard:
        for number, name in enumerate(names):
            shard["image_ids"][number] = name

    entry = manifest["shards"][0]
    entry |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_pictures_whose_ids_no_file_can_have(shop, tmp_path):
    """Check ids that are longer than clients may give: the answer is a drawing, not a server
    error.
    """
    store = tmp_path / "store"
    photos = tmp_path / "photos"
    shutil.copytree(shop[2], store)
    photos.mkdir()
    ids = ["长" * 100, "a" * 300, "b" * 4096, "a/b", "..", "nul\0", "white space", "?x=1#y%41"]
    rename_images(store, ids[:4])
    (photos / "c.jpg").write_bytes(b"\xff\xd8\xff")
    command = (
        "--load",
        shop[0] / "model",
        "--data-path",
        store,
        "--index",
        tmp_path / "index",
        "--image-folder",
        photos,
    )

    with Service(*command) as service:
        for name in ids[:4]:
            status, picture, headers = service.call("GET", f"/pictures/{quote(name, safe='')}")
            assert (status, headers["content-type"]) == (200, "image/svg+xml"), name
            assert picture.startswith(b"<svg")
            assert service.call("HEAD", f"/pictures/{quote(name, safe='')}")[0] == 200
            assert service.call("GET", f"/items/{quote(name, safe='')}")[1]["image_id"] == name

        for name in ids[4:]:
            assert service.call("GET", f"/pictures/{quote(name, safe='')}")[0] == 404

        assert "Traceback" not in "".join(service.lines["stderr"])
