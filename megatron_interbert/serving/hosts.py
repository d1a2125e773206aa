"""Check Host headers: otherwise another site's page could read the service, through a name that it
points at this machine (DNS rebinding).
"""

import ipaddress
import re
import socket
from dataclasses import dataclass

from megatron_interbert.errors import UsageError

HEADER = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::[0-9]{0,5})?")
NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


@dataclass(frozen=True)
class AllowedHosts:
    """Hold the names and addresses that a Host header may have, as `host_of` returns them;
    `endings` are those such as `.shop.example`, from `*.shop.example`.

    A browser sends an address as Host only for pages that came from that address, so any address
    may be allowed if the service listens on all of them.
    """

    names: frozenset[str]
    endings: tuple[str, ...] = ()
    any_address: bool = False
    any_host: bool = False

    @classmethod
    def of(cls, host: str, given: str) -> "AllowedHosts":
        """Combine this machine's own names, the address `host` and the comma-separated list
        `given`.

        Raises UsageError for an entry that no Host header can have.
        """
        entries = [entry.strip().lower() for entry in given.split(",") if entry.strip()]
        patterns = [entry for entry in entries if entry.startswith("*.")]
        plain = [entry for entry in entries if entry != "*" and entry not in patterns]
        for pattern in patterns:
            known_host(pattern.removeprefix("*."), pattern)

        addresses = addresses_of(host)
        names = (
            {known_host(entry, entry) for entry in plain} | own_names() | addresses | {host.lower()}
        )

        return cls(
            names=frozenset(names),
            endings=tuple(pattern.removeprefix("*") for pattern in patterns),
            any_address=any(ipaddress.ip_address(address).is_unspecified for address in addresses),
            any_host="*" in entries,
        )

    def allow(self, header: str) -> bool:
        """Check whether a Host header names this service; its port does not matter."""
        if self.any_host:
            return True

        try:
            host = host_of(header)
        except ValueError:
            return False

        if host in self.names or host.endswith(self.endings):
            return True

        return self.any_address and is_address(host)

    def told(self) -> str:
        """Return a line for the log: which hosts are answered, and how to add others."""
        if self.any_host:
            return (
                "--allowed-hosts *: any Host header is answered, so if a browser can reach this"
                " service, so can pages of other sites that point a name at it"
            )

        names = sorted(name for name in self.names if not (self.any_address and is_address(name)))
        names += [f"*{ending}" for ending in self.endings]
        if self.any_address:
            names.append("any IP address")

        return (
            f"Host headers that are answered: {', '.join(names)}; --allowed-hosts adds others, such"
            " as a proxy's"
        )


def host_of(header: str) -> str:
    """Return the name or address in a Host header, in lower case, without port, brackets and final
    dot.

    Raises ValueError for anything else.
    """
    match = HEADER.fullmatch(header.lower())
    if match is None:
        raise ValueError("neither a name nor an address")

    host = match[1]
    if host.startswith("["):
        return str(ipaddress.IPv6Address(host[1:-1]))

    host = host.removesuffix(".")
    if not NAME.fullmatch(host):
        raise ValueError("neither a name nor an address")

    return host


def is_address(host: str) -> bool:
    """Check whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False

    return True


def known_host(entry: str, shown: str) -> str:
    """Return an entry of --allowed-hosts in the form of `host_of`.

    Raises UsageError, with the entry as `shown`, if it has a port or is not a host.
    """
    bare = entry.removeprefix("[").removesuffix("]")
    if is_address(bare):
        return str(ipaddress.ip_address(bare))

    if not NAME.fullmatch(entry):
        raise UsageError(
            f"--allowed-hosts: '{shown[:80]}' is not a host; expected names or addresses without"
            " scheme, port or path, such as shop.example,*.shop.example,10.0.0.5, or * for any"
        )

    return entry


def own_names() -> set[str]:
    """Return the names by which browsers on this machine or in its network may call it."""
    found = {socket.gethostname().lower(), socket.getfqdn().lower()}
    return {name for name in found if NAME.fullmatch(name)} | {"localhost", "127.0.0.1", "::1"}


def addresses_of(host: str) -> set[str]:
    """Return the addresses that --host stands for; none if it is unknown, which listening will
    report.
    """
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()

    return {address[0].split("%")[0] for *_, address in found}
