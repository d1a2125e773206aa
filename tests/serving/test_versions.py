"""Test indexes of a running service: new versions under load, for one model and for two, with one
process that writes.
"""

import concurrent.futures
import sys
import threading
import time

import pytest

from tests.launching import launch, until
from tests.serving.made_shop import alike, expected, flags, random_model, scorer_of
from tests.serving_client import KEY, Service


def test_changes_and_new_versions_under_load_lose_nothing(shop, tmp_path, scorer):
    """Check that during searches, while items come and go, another process builds a new version to
    which the service switches; all changes survive that, and a restart.
    """
    index = tmp_path / "index"
    failures = []
    stop = threading.Event()

    with Service(*flags(shop, index)) as service:
        first = service.call("GET", "/readyz")[1]["index"]

        def ask():
            while not stop.is_set():
                status, answer, _ = service.call("POST", "/search", {"query": "红色", "k": 3})
                if status != 200 or len(answer["results"]) != 3:
                    failures.append((status, answer))

        def change():
            number = 0
            while not stop.is_set():
                number += 1
                body = {"image_id": f"test-{number % 40:06d}", "title": f"新款{number}"}
                status, answer, _ = service.call("PUT", f"/items/n{number}", body, key=KEY)
                if status != 201:
                    failures.append((status, answer))
                if (
                    number % 3 == 0
                    and service.call("DELETE", f"/items/n{number}", key=KEY)[0] != 204
                ):
                    failures.append(("delete", number))

                time.sleep(0.01)

            return number

        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            writer = pool.submit(change)
            readers = [pool.submit(ask) for _ in range(4)]
            folder, _, store = shop
            code, out, err = launch(
                *(
                    sys.executable,
                    "-m",
                    "megatron_interbert.serve",
                    "--build-only",
                    "--load",
                    folder / "model",
                    "--data-path",
                    store,
                ),
                *("--index", index),
            )
            assert code == 0, out + err
            until(
                lambda: service.call("GET", "/readyz")[1]["index"] != first,
                "the new version is served",
            )
            time.sleep(0.3)
            stop.set()
            written = writer.result()
            for reader in readers:
                reader.result()

        assert not failures
        assert "is served now" in "".join(service.lines["stderr"])
        there = {f"n{number}" for number in range(1, written + 1) if number % 3}
        listed = {key for key in there if service.call("GET", f"/items/{key}")[0] == 200}
        assert listed == there
        assert service.call("GET", "/readyz")[1]["items"] == 40 + len(there)

    with Service(
        *(flag for flag in flags(shop, index) if flag not in ("--items", store / "items.jsonl"))
    ) as again:
        assert again.call("GET", "/readyz")[1]["items"] == 40 + len(there)
        assert all(again.call("GET", f"/items/{key}")[0] == 200 for key in sorted(there)[:5])


def test_two_models_answer_searches_and_topics(shop, scorer, tmp_path):
    """Check that each answers by its own vectors and scores, and that changes of items reach both
    and survive a restart.
    """
    folder, model, store = shop
    other = random_model(folder / "topics model", model.config.model_config(), store, seed=5)
    both = (
        "--load-recommendation",
        folder / "topics model",
        "--recommendation-index",
        tmp_path / "topics index",
    )
    everything = flags(shop, tmp_path / "index", *both)
    path = "/items/new"
    body = {"image_id": "test-000003", "title": "红色条纹连衣裙"}

    with Service(*everything) as service:
        topic = service.call("GET", "/topics")[1][0]
        asked = {"topic_id": topic["topic_id"], "k": 5, "candidates": 40}
        answer = service.call("POST", "/recommend", asked)[1]
        alike(
            [(i["item_id"], i["score"]) for i in answer["results"]],
            expected(scorer_of(other, store), topic["text"], 5),
        )
        alike(service.search(topic["text"], k=5, candidates=40), expected(scorer, topic["text"], 5))
        ready = service.call("GET", "/readyz")[1]
        assert (answer["model"], answer["index"]) == (
            ready["recommendation"]["model"],
            ready["recommendation"]["index"],
        )
        assert answer["model"] != ready["model"]
        ids = [item["item_id"] for item in answer["results"]]
        again = service.call(
            "POST", "/score", {"text": topic["text"], "item_ids": ids, "task": "recommendation"}
        )[1]
        assert [i["score"] for i in again["results"]] == pytest.approx(
            [i["score"] for i in answer["results"]], rel=1e-4
        )
        assert [service.call("PUT", path, body, key=KEY)[0] for _ in range(2)] == [201, 200]
        assert service.call("DELETE", "/items/" + ids[0], key=KEY)[0] == 204
        assert service.call("DELETE", "/items/" + ids[0], key=KEY)[0] == 404

        journal = tmp_path / "topics index" / "journal.jsonl"
        aside = tmp_path / "aside"
        journal.rename(aside)
        journal.write_text("of others\n")
        assert service.call("PUT", "/items/half", body, key=KEY)[0] == 503
        assert service.call("DELETE", "/items/new", key=KEY)[0] == 503
        assert [service.call("GET", f"/items/{name}")[0] for name in ("half", "new")] == [
            404,
            200,
        ], "made in neither of them"
        aside.rename(journal)

    with Service(*everything) as service:
        found = [
            i["item_id"]
            for i in service.call("POST", "/recommend", {**asked, "k": 40})[1]["results"]
        ]
        assert "new" in found
        assert ids[0] not in found
        assert service.call("GET", "/readyz")[1]["recommendation"]["items"] == 40

    known = ("--load", folder / "model", "--data-path", store, "--index", tmp_path / "index")
    code, out, err = launch(
        sys.executable, "-m", "megatron_interbert.serve", "--build-only", *known, *both
    )
    assert code == 0, out + err
    assert len(out.splitlines()) == 2, "a line for each"
    code, _, err = launch(
        sys.executable,
        "-m",
        "megatron_interbert.serve",
        *known,
        *both[:2],
        "--recommendation-index",
        tmp_path / "index",
    )
    assert (code, "two models need an index each" in err) == (2, True)


def test_a_build_of_other_weights_or_items_says_what_it_does(shop, tmp_path):
    """Check that other weights need --rebuild, and that changes which --items overrides are
    reported, or dropped if they cannot be read.
    """
    folder, model, store = shop
    random_model(folder / "other model", model.config.model_config(), store, seed=6)
    common = (
        sys.executable,
        "-m",
        "megatron_interbert.serve",
        "--build-only",
        "--data-path",
        store,
        "--index",
        tmp_path / "index",
    )

    with Service(*flags(shop, tmp_path / "index")) as service:
        assert (
            service.call("PUT", "/items/x", {"image_id": "test-000001", "title": "红色"}, key=KEY)[
                0
            ]
            == 201
        )
        assert service.call("DELETE", "/items/test-000002", key=KEY)[0] == 204
        code, _, err = launch(*common, "--load", folder / "other model")
        assert code == 2
        assert (
            "made with other weights or settings; give --rebuild to build the index"
            in err.strip().splitlines()[-1]
        )

    code, out, err = launch(*common, "--load", folder / "other model", "--rebuild")
    assert code == 0, out + err

    with Service(
        "--load", folder / "other model", "--data-path", store, "--index", tmp_path / "index"
    ) as service:
        assert service.call("GET", "/items/x")[0] == 200

    code, out, err = launch(
        *common, "--load", folder / "model", "--rebuild", "--items", store / "items.jsonl"
    )
    assert code == 0, out + err
    assert "dropping" not in err, "changes are in the items of the version before"
    with Service(*flags(shop, tmp_path / "index")) as service:
        assert service.call("GET", "/items/x")[0] == 404
        assert service.call("DELETE", "/items/test-000002", key=KEY)[0] == 204

    code, out, err = launch(
        *common, "--load", folder / "model", "--rebuild", "--items", store / "items.jsonl"
    )
    assert code == 0, out + err
    assert "changes of items since" in err
    with open(tmp_path / "index" / "journal.jsonl", "a") as file:
        file.write("half a line\n")

    code, _, err = launch(*common, "--load", folder / "model")
    assert (code, "begin anew from your items (--rebuild --items FILE)" in err) == (2, True)
    code, out, err = launch(
        *common, "--load", folder / "model", "--rebuild", "--items", store / "items.jsonl"
    )
    assert code == 0, out + err

    with Service(*flags(shop, tmp_path / "index")) as service:
        assert (
            service.call("PUT", "/items/x", {"image_id": "test-000001", "title": "红色"}, key=KEY)[
                0
            ]
            == 201
        )


def test_a_service_without_a_key_follows_builds(shop, tmp_path):
    """Check several builds in a row, and that it can be started again afterwards."""
    folder, _, store = shop
    known = ("--load", folder / "model", "--data-path", store, "--index", tmp_path / "index")

    with Service(*known, key="") as service:
        for _ in range(3):
            served = service.call("GET", "/readyz")[1]["index"]
            code, out, err = launch(
                sys.executable, "-m", "megatron_interbert.serve", "--build-only", *known
            )
            assert code == 0, out + err
            until(
                lambda served=served: service.call("GET", "/readyz")[1]["index"] != served,
                "the new version is served",
            )

        assert service.search("红色")

    with Service(*known, key="") as again:
        assert again.call("GET", "/readyz")[1]["items"] == 40

    assert len([path for path in (tmp_path / "index").iterdir() if len(path.name) == 12]) <= 3


def test_a_second_writer_and_lost_pictures_are_refused(shop, tmp_path):
    folder, _, store = shop
    index = tmp_path / "index"
    command = (
        sys.executable,
        "-m",
        "megatron_interbert.serve",
        "--load",
        folder / "model",
        "--index",
        index,
        "--data-path",
    )

    with Service(*flags(shop, index)) as service:
        assert (
            service.call(
                "PUT", "/items/x", {"image_id": "test-000001", "title": "红\u2028色"}, key=KEY
            )[0]
            == 201
        )

        assert (
            service.call(
                "PUT", "/items/x", {"image_id": "test-000001", "title": "红\u2028色"}, key=KEY
            )[0]
            == 200
        ), "nothing new"
        code, _, err = launch(*command, store, "--port", 0, INTERBERT_API_KEY="k")
        assert code == 2
        assert "another service with a key writes to this index" in err.strip().splitlines()[-1]
        code, _, err = launch(*command, store, "--port", 0, "--rebuild", INTERBERT_API_KEY="k")
        assert (code, "another service with a key writes to this index" in err) == (
            2,
            True,
        ), "even one that builds its own version"
        with Service(*flags(shop, index), key="") as reader:
            assert reader.call("GET", "/items/x")[0] == 200

    code, out, err = launch(*command, store, "--build-only", "--items", store / "items.jsonl")
    assert code == 0, out + err

    with Service(*flags(shop, index)) as service:
        assert service.call("GET", "/items/x")[1]["title"] == "红\u2028色", (
            "it is still there after a build, whatever --items says"
        )

    code, _, err = launch(*command, folder / "shop" / "train", "--port", 0)
    assert code == 2
    assert "Traceback" not in err
    assert "made with other weights" in err or "which is not in" in err
