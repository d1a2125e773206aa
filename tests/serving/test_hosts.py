"""Test which names Host headers may have; test_limits.py tests what a running service answers."""

import socket
import sys

import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.hosts import AllowedHosts
from tests.launching import launch

OWN = [
    "localhost",
    "LocalHost:8080",
    "127.0.0.1:65535",
    "[::1]",
    "[0000::0001]:8080",
    socket.gethostname().upper(),
]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "0.0.0.0", "::", "", "localhost", "::1", "10.1.2.3", "no-such-name.invalid"],
)
def test_own_names_are_always_answered(host):
    hosts = AllowedHosts.of(host, "")
    assert [name for name in OWN if not hosts.allow(name)] == []
    assert not hosts.allow("evil.example")
    assert not hosts.allow("127.0.0.1.evil.example:80")


@pytest.mark.parametrize(
    ("host", "header", "allowed"),
    [
        ("127.0.0.1", "10.1.2.3:8080", False),
        ("10.1.2.3", "10.1.2.3:8080", True),
        ("10.1.2.3", "10.1.2.4:8080", False),
        ("2001:DB8::1", "[2001:db8:0::1]", True),
        ("2001:db8::1", "[2001:db8::2]", False),
        ("no-such-name.invalid", "No-Such-Name.invalid:80", True),
        ("0.0.0.0", "10.1.2.3", True),
        ("::", "[2001:db8::2]:1", True),
        ("", "192.168.0.1", True),
        ("0.0.0.0", "10.1.2.3.4", False),
        ("0.0.0.0", "0x0a.1.2.3", False),
        ("0.0.0.0", "shop.example", False),
    ],
)
def test_addresses(host, header, allowed):
    assert AllowedHosts.of(host, "").allow(header) is allowed


def test_names_that_are_given():
    hosts = AllowedHosts.of("127.0.0.1", " Shop.example , *.shop.example,10.0.0.9,[2001:DB8::5],")
    for header in (
        "shop.example",
        "SHOP.EXAMPLE:443",
        "a.b.shop.example",
        "10.0.0.9:1",
        "[2001:db8::5]",
        "localhost",
    ):
        assert hosts.allow(header), header

    for header in (
        "evilshop.example",
        "shop.example.evil",
        ".shop.example",
        "shop.example:x",
        "10.0.0.8",
        "x",
    ):
        assert not hosts.allow(header), header

    assert "shop.example" in hosts.told()
    assert "*.shop.example" in hosts.told()


def test_any_host():
    hosts = AllowedHosts.of("127.0.0.1", "a,*")
    assert hosts.allow("evil.example")
    assert hosts.allow("?")
    assert "any Host header is answered" in hosts.told()


@pytest.mark.parametrize(
    "entry",
    [
        "http://a.example",
        "a.example:80",
        "a.example/x",
        "*a.example",
        "a.*.b",
        "*.",
        "[::1]:80",
        "a b",
        "shop.例子",
        "a..b",
        "[a]",
    ],
)
def test_entries_that_no_header_can_have(entry):
    with pytest.raises(
        UsageError, match=r"--allowed-hosts: '.*' is not a host; expected names or addresses"
    ):
        AllowedHosts.of("127.0.0.1", f"good.example,{entry}")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (
            ("--allowed-hosts", "http://shop.example"),
            "--allowed-hosts: 'http://shop.example' is not a host",
        ),
        (("--header-timeout", "0"), "--header-timeout is 0.0, expected more than 0"),
        (("--keep-alive-timeout", "nan"), "--keep-alive-timeout nan: expected a finite number"),
        (("--max-connections", "0"), "--max-connections is 0"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_loaded(flags, error):
    code, _, said = launch(
        sys.executable, "-m", "megatron_interbert.serve", "--load", "no/such/run", *flags
    )
    assert code == 2
    assert said.strip().splitlines()[-1].startswith(f"error: {error}")
    assert "Traceback" not in said
