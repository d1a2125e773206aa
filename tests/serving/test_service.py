"""Test the service as users start it: answers against brute force, changes of items, wrong input,
keys, full queues, shutdown.
"""

import concurrent.futures
import dataclasses
import signal
import socket
import sys
import threading
import time
from urllib.parse import quote

import numpy as np
import pytest

from megatron_interbert.data.corpus import Corpus
from tests.launching import launch, until
from tests.serving.made_shop import alike, expected, flags, random_model, scorer_of
from tests.serving_client import KEY, Service


@pytest.fixture(scope="module")
def service(shop, tmp_path_factory):
    with Service(*flags(shop, tmp_path_factory.mktemp("index") / "index")) as running:
        yield running


def test_answers_are_those_of_the_model(service, scorer):
    for text in ("红色条纹连衣裙", "Nordo靴子", "Ａ４ 連衣裙"):
        alike(service.search(text, k=7, candidates=40), expected(scorer, text, 7))

    status, topics, _ = service.call("GET", "/topics")
    assert (status, len(topics)) == (200, 3)
    status, answer, _ = service.call(
        "POST", "/recommend", {"topic_id": topics[1]["topic_id"], "k": 5, "candidates": 40}
    )
    assert status == 200
    alike(
        [(item["item_id"], item["score"]) for item in answer["results"]],
        expected(scorer, topics[1]["text"], 5),
    )
    own = {"name": "清爽海滩系列", "description": "在海滩拍的蓝色", "keywords": ["泳衣", "凉鞋"]}
    status, answer, _ = service.call("POST", "/recommend", {"topic": own, "k": 3, "candidates": 40})
    alike(
        [(i["item_id"], i["score"]) for i in answer["results"]],
        expected(scorer, "清爽海滩系列 在海滩拍的蓝色 泳衣 凉鞋", 3),
    )
    assert set(answer["timings"]) == {"queue_ms", "compute_ms", "batch_size"}
    assert len(answer["model"]) == 12


def test_a_model_with_experts_is_served(shop, tmp_path):
    """Check that answers do not depend on what is asked at the same time."""
    _, dense, store = shop
    sizes = dataclasses.replace(dense.config.model_config(), experts=4, prototypes=2)
    model = random_model(tmp_path / "model", sizes, store, seed=3)
    scorer = scorer_of(model, store)
    texts = ("红色条纹连衣裙", "Nordo靴子", "蓝色运动鞋", "在海滩拍的")

    with Service(*flags((tmp_path, model, store), tmp_path / "index")) as service:

        def ask(text):
            return service.search(text, k=7, candidates=40)

        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            for text, found in zip(texts, pool.map(ask, texts), strict=True):
                alike(found, expected(scorer, text, 7))


def test_the_first_stage_leaves_the_best_by_vectors(service, scorer):
    text = "蓝色运动鞋"
    vectors = scorer.item_vectors(np.arange(40))
    wanted = scorer.text_vectors(scorer.pieces([text]))[0]
    left = {scorer.catalogue.ids[item] for item in np.argsort(-(vectors @ wanted))[:6]}
    assert {item for item, _ in service.search(text, k=6, candidates=6)} == left


def test_scores_and_regions(service, scorer, shop):
    ids = [scorer.catalogue.ids[item] for item in (5, 0, 17)]
    status, answer, _ = service.call("POST", "/score", {"text": "红色凉鞋", "item_ids": ids})
    assert status == 200
    scores = scorer.match(scorer.pieces(["红色凉鞋"]), np.zeros(3, np.int64), np.array([5, 0, 17]))
    assert [item["item_id"] for item in answer["results"]] == ids
    assert [item["score"] for item in answer["results"]] == pytest.approx(
        scores.tolist(), rel=1e-3, abs=1e-3
    )
    status, answer, _ = service.call(
        "POST", "/score", {"text": "红色凉鞋", "item_ids": ids[:1], "explain": True}
    )
    regions = answer["regions"]
    assert len(regions) == len(Corpus([str(shop[2])]).stores[0].read(5).boxes)
    assert max(abs(region["weight"]) for region in regions) == 1
    assert all(0 <= x <= 1 for region in regions for x in region["box"])


def test_items_come_change_and_go(service):
    path = "/items/" + quote("新品")
    body = {
        "image_id": "test-000003",
        "title": "红色条纹连衣裙 特别款",
        "attributes": {"price": "9.9"},
    }
    assert service.call("PUT", path, body)[0] == 401
    assert service.call("PUT", path, body, key="wrong")[0] == 401
    status, answer, _ = service.call("PUT", path, body, key=KEY)
    assert (status, answer["title"]) == (201, body["title"])
    assert "新品" in [item for item, _ in service.search("红色条纹连衣裙", k=50, candidates=100)]
    assert service.call("PUT", path, {**body, "title": "蓝色靴子"}, key=KEY)[0] == 200
    assert service.call("GET", path)[1]["title"] == "蓝色靴子"
    found = [item for item, _ in service.search("红色条纹连衣裙", k=50, candidates=100)]
    assert found.count("新品") == 1
    status, picture, headers = service.call("GET", path.replace("items", "pictures"))
    assert (status, headers["content-type"]) == (200, "image/svg+xml")
    assert b"<rect" in picture
    assert service.call("DELETE", path, key=KEY)[0] == 204
    assert service.call("DELETE", path, key=KEY)[0] == 404
    assert service.call("GET", path)[0] == 404
    assert len(service.search("红色", k=50, candidates=100)) == 40
    status, answer, _ = service.call("PUT", path, {"image_id": "nowhere"}, key=KEY)
    assert (status, answer) == (422, {"error": "image_id: no such image in the region stores"})


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({}, 422, "query: Field required"),
        ({"query": ""}, 422, "query: String should have at least 1 character"),
        ({"query": " \t"}, 422, "query: no text"),
        ({"query": "x" * 257}, 422, "query: String should have at most 256 characters"),
        ({"query": "x", "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ({"query": "x", "k": 10**30}, 422, "k: "),
        ({"query": "x", "k": 1.5}, 422, "k: Input should be a valid integer"),
        ({"query": "x", "path": "/etc/passwd"}, 422, "path: Extra inputs are not permitted"),
        ({"query": ["x"]}, 422, "query: Input should be a valid string"),
        ([], 422, "body: not a JSON object; send one, with content-type: application/json"),
    ],
)
def test_wrong_requests_are_one_line(service, body, status, error):
    found, answer, _ = service.call("POST", "/search", body)
    assert found == status
    assert list(answer) == ["error"]
    assert answer["error"].startswith(error)


def test_bytes_that_are_no_text(service):
    for raw in (
        b"\xff\xfe{",
        b'{"query": "\xff"}',
        b"",
        b"{",
        b'{"query": "\\ud800"}',
        b'{"query": "a\\u0000"}',
        b"[" * 5000,
    ):
        status, answer, _ = service.call("POST", "/search", raw=raw)
        assert status in (400, 422), raw
        assert list(answer) == ["error"]

    assert service.call("POST", "/search", raw=b'{"query": "' + b"x" * 70000 + b'"}')[0] == 413
    assert service.call("GET", "/items/%ff%fe")[0] == 404
    assert service.call("GET", "/pictures/..%2f..%2fetc%2fpasswd")[0] == 404
    assert service.call("GET", "/nothing")[0] == 404
    assert service.call("PATCH", "/search", {})[0] == 405


def test_what_it_says_of_itself(service):
    status, facts, _ = service.call("GET", "/readyz")
    assert (status, facts["ready"]) == (200, True)
    assert service.call("GET", "/healthz")[1] == {"status": "alive"}
    status, text, _ = service.call("GET", "/metrics")
    assert b'interbert_requests_total{route="/search",status="200"}' in text
    assert b"interbert_items" in text
    status, page, headers = service.call("GET", "/")
    assert status == 200
    assert b"http" not in page.replace(b"http-equiv", b""), "nothing from other sites"
    assert "default-src 'self'" in headers["content-security-policy"]
    schema = service.call("GET", "/openapi.json")[1]
    assert {
        "/search",
        "/recommend",
        "/score",
        "/topics",
        "/items/{item_id}",
        "/pictures/{item_id}",
    } <= set(schema["paths"])
    log = "".join(service.lines["stderr"])
    assert "POST /search 200" in log
    for secret in (KEY, "红色", "wrong", "Traceback"):
        assert secret not in log


def test_slow_bodies_end(shop, tmp_path):
    with Service(*flags(shop, tmp_path / "index", "--body-seconds", 1)) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:
            line.sendall(
                b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
                b" application/json\r\ncontent-length: 100\r\n\r\n{"
            )
            started = time.monotonic()
            answer = line.recv(65536)

        assert b" 408 " in answer.split(b"\r\n")[0]
        assert time.monotonic() - started < 10
        assert service.search("红色")


def test_a_full_queue_and_deadlines(shop, tmp_path):
    """Check that many simultaneous requests are all answered, with 200, 429 or (past the deadline)
    503, and that afterwards all is as before.
    """
    more = ("--queue-size", 4, "--pairs-at-once", 40, "--deadline", 0.05)

    with (
        Service(*flags(shop, tmp_path / "index", *more)) as service,
        concurrent.futures.ThreadPoolExecutor(32) as pool,
    ):
        body = {"query": "红色条纹连衣裙", "candidates": 40}
        found = list(pool.map(lambda _: service.call("POST", "/search", body)[0], range(200)))
        assert set(found) <= {200, 429, 503}
        assert 200 in found
        assert 429 in found
        assert service.search("红色条纹连衣裙")


def test_it_drains(shop, tmp_path):
    """Check that every question under way at SIGTERM is answered, while most of them still wait."""
    more = ("--batch-pairs", 1, "--deadline", 60)

    with (
        Service(*flags(shop, tmp_path / "index", *more)) as service,
        concurrent.futures.ThreadPoolExecutor(100) as pool,
    ):
        body = {"query": "红色条纹连衣裙", "candidates": 40}
        asked = [pool.submit(service.call, "POST", "/search", body) for _ in range(100)]

        def accepted():
            text = service.call("GET", "/metrics")[1].decode()
            waiting = float(
                next(
                    line for line in text.splitlines() if line.startswith("interbert_waiting ")
                ).split()[1]
            )
            # up to two may be neither in the queue nor done
            return waiting > 10 and waiting + sum(answer.done() for answer in asked) >= 98

        until(accepted, "all questions in the queue or answered")
        service.process.send_signal(signal.SIGTERM)
        assert {answer.result()[0] for answer in asked} == {200}
        assert service.process.wait(30) in (0, -signal.SIGTERM)


def test_connections_that_ask_nothing_do_not_hold_it_up(shop, tmp_path):
    """Check connections that come at the moment when the service is told to end, too."""
    with Service(*flags(shop, tmp_path / "index")) as service:
        host, port = service.url.removeprefix("http://").split(":")
        stop = threading.Event()
        held = []

        def connect():
            while not stop.is_set():
                try:
                    held.append(socket.create_connection((host, int(port)), 1))
                except OSError:
                    return

                time.sleep(0.002)

        threads = [threading.Thread(target=connect) for _ in range(4)]
        for thread in threads:
            thread.start()

        until(lambda: len(held) > 100, "many connections")
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(15) in (0, -signal.SIGTERM), "half of --drain-seconds"
        stop.set()
        for thread in threads:
            thread.join()
        for connection in held:
            connection.close()


def test_wrong_use_is_one_line(shop, tmp_path):
    folder, _, store = shop

    def refused(*more):
        code, _, err = launch(sys.executable, "-m", "megatron_interbert.serve", *more)
        assert code == 2, err
        assert "Traceback" not in err
        return err.strip().splitlines()[-1]

    known = ("--load", folder / "model", "--data-path", store, "--index", tmp_path / "index")
    assert "--load is missing" in refused("--data-path", store)
    assert "--protect-reads needs a key" in refused(*known, "--protect-reads")
    assert "no topics.jsonl" in refused(*known, "--topics", tmp_path / "no topics.jsonl")
    assert "--image-folder nowhere: no such folder" in refused(*known, "--image-folder", "nowhere")

    for lines, message in (
        ('{"item_id": "a", "title": "x"}', "line 1: image a is not in"),
        (
            '{"item_id": "test-000001", "title": "x"}\n' * 2,
            "line 2: item test-000001 occurs twice",
        ),
        (
            '{"item_id": "", "image_id": "test-000001", "title": "x"}',
            "line 1: item_id: String should have at least 1 character",
        ),
        (
            '{"item_id": "a", "image_id": "test-000001", "title": "' + "长" * 257 + '"}',
            "line 1: title: String should have at most 256",
        ),
        (
            '{"item_id": "a", "image_id": "test-000001", "title": "x", "brand": null}',
            "line 1: 'brand' is null, expected a text or a",
        ),
        (
            '{"item_id": "a", "image_id": "test-000001", "title": "\\ud800"}',
            "line 1: a lone surrogate",
        ),
    ):
        (tmp_path / "items.jsonl").write_text(lines + "\n")
        assert message in refused(*known, "--items", tmp_path / "items.jsonl", "--rebuild")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen at" in refused(*known, "--port", taken.getsockname()[1])
    with Service(*known, "--protect-reads") as service:
        assert service.call("POST", "/search", {"query": "红色"})[0] == 401
        assert service.call("POST", "/search", {"query": "红色"}, key=KEY)[0] == 200
        assert service.call("GET", "/healthz")[0] == service.call("HEAD", "/readyz")[0] == 200
        raw = {"authorization": KEY}
        assert service.call("POST", "/search", {"query": "红色"}, headers=raw)[0] == 401, (
            "the scheme is required"
        )

    with Service(*known, key="") as service:
        assert service.call("DELETE", "/items/test-000001", key="")[0] == 403


def test_a_client_that_goes_is_not_computed_for(shop, tmp_path):
    """Check that the questions of many clients that ask and leave are dropped from the queue, and
    others are answered.
    """
    with Service(*flags(shop, tmp_path / "index", "--batch-pairs", 40)) as service:
        host, port = service.url.removeprefix("http://").split(":")
        body = b'{"query": "\xe7\xba\xa2\xe8\x89\xb2", "candidates": 40}'
        head = (
            "POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
            f" application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        )
        lines = [socket.create_connection((host, int(port))) for _ in range(100)]
        for line in lines:
            line.sendall(head + body)

        until(
            lambda: b"interbert_waiting 0.0" not in service.call("GET", "/metrics")[1], "the queue"
        )
        for line in lines:
            line.close()

        assert service.search("红色", k=3)
        text = service.call("GET", "/metrics")[1].decode()
        gone = float(
            next(
                line for line in text.splitlines() if line.startswith("interbert_gone_total")
            ).split()[1]
        )
        assert gone > 5
        assert 'interbert_requests_total{route="/search",status="499"}' in text
