"""Closes the network to the process, so that a test that needs it fails at once."""

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dipeo_llm.client import is_loopback


class NetworkBlockedError(RuntimeError):
    """Something reached for the network inside `block_network`."""


@contextmanager
def block_network(*, allow_loopback: bool = True) -> Iterator[None]:
    """Refuse every connection and every look-up of a name, for as long as it lasts.

    Args:
        allow_loopback: Whether this machine may still be reached, by an address of its
            own or a Unix socket. False refuses those too.

    What is refused raises NetworkBlockedError where it was tried. It holds for the whole
    process, all threads included, as long as they use Python's sockets.
    """

    def check(family: int, address: Any, what: str = "connect to") -> None:
        if isinstance(address, tuple):
            host, *port = address[:2]
            name = ":".join(map(str, [_host(host), *port]))
            is_here = is_loopback(_host(host))
        else:
            name, is_here = str(address), family == getattr(socket, "AF_UNIX", None)
        if not (allow_loopback and is_here):
            raise NetworkBlockedError(
                f"refused to {what} {name}: the network is closed by block_network"
            )

    def connecting(method: str) -> Any:
        real = getattr(socket.socket, method)

        def guarded(self: socket.socket, *args: Any) -> Any:
            # sendmsg has its address as the fourth, and none where it is connected.
            for address in filter(None, args[3:] if method == "sendmsg" else args[-1:]):
                check(self.family, address)
            return real(self, *args)

        return guarded

    def resolving(function: str) -> Any:
        real = getattr(socket, function)

        def guarded(host: Any, *args: Any, **options: Any) -> Any:
            if host not in {None, "", b""}:
                check(0, host if isinstance(host, tuple) else (host,), "look up")
            return real(host, *args, **options)

        return guarded

    with replaced(
        [(socket.socket, name, connecting(name)) for name in _METHODS]
        + [(socket, name, resolving(name)) for name in _FUNCTIONS]
    ):
        yield


# Windows has no sendmsg. getfqdn and create_connection come by these.
_METHODS = tuple(
    name
    for name in ("connect", "connect_ex", "sendto", "sendmsg")
    if hasattr(socket.socket, name)
)
_FUNCTIONS = (
    "getaddrinfo",
    "gethostbyname",
    "gethostbyname_ex",
    "gethostbyaddr",
    "getnameinfo",
)


def _host(host: Any) -> str:
    return host.decode() if isinstance(host, bytes) else str(host)


@contextmanager
def replaced(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, and put back what was there, or was inherited, before."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in attributes:
            before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
