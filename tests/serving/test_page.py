"""Test the page in a real browser: search, opening a product, languages, topics, errors, keyboard,
phone.
"""

import pytest

from tests.launching import until
from tests.serving.made_shop import flags
from tests.serving_client import KEY, Service


@pytest.fixture(scope="module")
def url(shop, tmp_path_factory):
    _, _, store = shop
    with Service(
        *flags(
            shop, tmp_path_factory.mktemp("index") / "index", "--image-folder", store / "pictures"
        )
    ) as service:
        yield service.url


@pytest.mark.parametrize("width", [1280, 390])
def test_a_search_and_a_product(visit, url, width):
    page = visit(url, width)
    assert page.title() == "商品搜索"
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.type("红色条纹连衣裙")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results li")
    assert page.locator("#results li").count() == 24
    assert "24 件商品" in page.inner_text("#status")
    loaded = (
        "[...document.querySelectorAll('#results img')].slice(0, 4).every(i => i.complete &&"
        " i.naturalWidth > 0)"
    )
    # the page's policy forbids playwright's own way to wait for a function
    until(lambda: page.evaluate(loaded), "the pictures")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "nothing is wider than the window"
    )
    title = page.inner_text("#results li:first-child span")
    page.keyboard.press("Tab")  # the button
    page.locator("#results li:first-child button").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] rect", state="attached")
    assert (
        page.locator("#product img").bounding_box() == page.locator("#product svg").bounding_box()
    ), "boxes are on the picture"
    assert page.inner_text("dialog h2") == title
    assert "匹配分" in page.inner_text("dialog .score")
    inside = (
        "[...document.querySelectorAll('dialog rect')].every(r => +r.getAttribute('x') >= 0 &&"
        " +r.getAttribute('width') <= 1)"
    )
    assert page.evaluate(inside)
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_both_languages(visit, url):
    page = visit(url)
    page.click("#language")
    assert page.title() == "Product search"
    assert page.get_attribute("html", "lang") == "en"
    page.fill("#query", "蓝色靴子")
    page.click("text=Search >> nth=-1")
    page.wait_for_selector("#results li")
    assert "24 products" in page.inner_text("#status")
    page.reload()
    assert page.title() == "Product search", "the language is remembered"
    page.click("#language")
    assert page.inner_text("form[role=search] button") == "搜索"
    assert visit(url, language="en-GB").title() == "Product search"


def test_a_topic_and_an_error(visit, url, request):
    request.node.allowed = ("422", "Failed to load")
    page = visit(url)
    page.wait_for_selector("#topics button")
    assert page.locator("#topics button").count() == 3
    page.click("#topics li:nth-child(2) button")
    page.wait_for_selector("#results li")
    assert page.get_attribute("#topics li:nth-child(2) button", "aria-pressed") == "true"
    page.evaluate("document.querySelector('#query').maxLength = 9999")
    page.fill("#query", "长" * 300)
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.wrong")
    assert "at most 256 characters" in page.inner_text("#status")
    assert page.locator("#results li").count() == 0
    page.keyboard.press("Tab")
    page.locator("#language").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"


def test_titles_are_text_and_never_markup(visit, shop, tmp_path):
    with Service(*flags(shop, tmp_path / "index")) as service:
        body = {
            "image_id": "test-000001",
            "title": "<img src=x onerror=alert(1)><b>红色</b>",
            "attributes": {"<i>": "</dd><script>"},
        }
        assert service.call("PUT", "/items/a%2F%3Fb%23c", body, key=KEY)[0] == 201
        for number in range(20, 40):  # the page shows 24
            assert service.call("DELETE", f"/items/test-{number:06d}", key=KEY)[0] == 204

        page = visit(service.url)
        page.fill("#query", "红色")
        page.evaluate("words.zh.found = () => 'x'")
        page.keyboard.press("Enter")
        page.wait_for_selector("#results li")
        answer = service.call("POST", "/search", {"query": "红色", "k": 50, "candidates": 100})[1]
        assert body["title"] in [item["title"] for item in answer["results"]]
        assert not page.locator("#results b").count()
        page.locator("#results button", has_text="onerror").click()
        page.wait_for_selector("#product[open] rect")
        assert page.inner_text("#product h2") == body["title"]
        assert page.locator("#product dt").all_inner_texts()[1:] == ["<i>"]
        assert page.locator("#product dd").all_inner_texts()[1:] == ["</dd><script>"]
        assert not page.locator("#product :is(i, b, script)").count()
        page.close()  # before the service ends, because pictures load as they come into view


def test_a_protected_service_asks_for_the_key(visit, shop, tmp_path, request):
    request.node.allowed = ("401", "Failed to load")
    with Service(*flags(shop, tmp_path / "index", "--protect-reads")) as service:
        page = visit("about:blank")
        page.on("dialog", lambda dialog: dialog.accept(KEY))
        request.node.allowed = ("401", "Failed to load", service.url)
        page.goto(service.url)
        page.wait_for_selector("#topics li")  # the key was asked for and given
        page.fill("#query", "红色")
        page.keyboard.press("Enter")
        page.wait_for_selector("#results li")
        until(
            lambda: page.evaluate("document.querySelector('#results img').naturalWidth > 0"),
            "the pictures",
        )
        page.close()
