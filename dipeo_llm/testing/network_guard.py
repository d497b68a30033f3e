"""Closes the network to the process, so that a test that needs it fails at once."""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from dipeo_llm.client import is_loopback


class NetworkBlockedError(RuntimeError):
    """Something reached for the network inside `block_network`."""


@contextmanager
def block_network(
    *,
    allow_loopback: bool = True,
    allow_hosts: Sequence[str] = (),
    lookups: bool = True,
    refuse: Callable[[str], Exception] = lambda what: NetworkBlockedError(
        f"refused to {what}: the network is closed by block_network"
    ),
) -> Iterator[None]:
    """Refuse every connection and every look-up of a name, for as long as it lasts.

    Args:
        allow_loopback: Whether this machine may still be reached, by an address of its
            own or a Unix socket.
        allow_hosts: Names and addresses that may be reached, such as "db.internal" or
            `*.example.com`.
        lookups: Whether look-ups are refused too.
        refuse: Makes the error from what was tried, such as "connect to 192.0.2.1:443".

    What is refused raises NetworkBlockedError where it was tried. This holds for the
    whole process, all threads included, as long as they use Python's sockets; code that
    brings sockets of its own, such as grpc, uvloop or curl, is not seen.
    """
    guard = _Guard(allow_loopback, tuple(allow_hosts), lookups, refuse)
    with replaced(
        [(socket.socket, name, guard.wrap_connect(name)) for name in _METHODS]
        + [(socket, name, guard.wrap_lookup(name)) for name in _FUNCTIONS]
    ):
        yield


@dataclass(frozen=True, slots=True)
class _Guard:
    allow_loopback: bool
    allow_hosts: tuple[str, ...]
    lookups: bool
    refuse: Callable[[str], Exception]
    resolved: set[str] = field(default_factory=set)
    """The addresses of the allowed hosts."""

    def wrap_connect(self, method: str) -> Any:
        """Wrap a method of sockets that connects, or sends to an address."""
        real = getattr(socket.socket, method)

        def guarded(sock: socket.socket, *args: Any) -> Any:
            # sendmsg has its address fourth, and none on a connected socket.
            for address in filter(None, args[3:] if method == "sendmsg" else args[-1:]):
                self._check(sock.family, address, "connect to")
            return real(sock, *args)

        return guarded

    def wrap_lookup(self, function: str) -> Any:
        """Wrap a function that looks up a name, or an address."""
        real = getattr(socket, function)

        def guarded(host: Any, *args: Any, **options: Any) -> Any:
            if self.lookups and host not in {None, "", b""}:
                self._check(0, host if isinstance(host, tuple) else (host,), "look up")
            found = real(host, *args, **options)
            if is_named(_text(host), self.allow_hosts):
                self.resolved.update(_addresses(found))
            return found

        return guarded

    def _check(self, family: int, address: Any, what: str) -> None:
        if isinstance(address, tuple):
            host, *port = map(_text, address[:2])
            name = ":".join([host, *port])
            allowed = host in self.resolved or is_named(host, self.allow_hosts)
            is_here = is_loopback(host)
        else:
            name, allowed = str(address), False
            is_here = family == getattr(socket, "AF_UNIX", None)
        if not (allowed or _open.get() or (self.allow_loopback and is_here)):
            raise self.refuse(f"{what} {name}")


_open: ContextVar[bool] = ContextVar("open_network", default=False)


@contextmanager
def open_network() -> Iterator[None]:
    """Let this task or thread, and the tasks that it starts, through `block_network`."""
    token = _open.set(True)
    try:
        yield
    finally:
        _open.reset(token)


def is_named(host: str, patterns: Sequence[str]) -> bool:
    """Say whether a host fits one of the patterns, whatever its case."""
    return any(fnmatch(host.lower(), pattern.lower()) for pattern in patterns)


# Windows has no sendmsg. getfqdn and create_connection are built on these.
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


def _text(host: Any) -> str:
    return host.decode() if isinstance(host, bytes) else str(host)


def _addresses(found: Any) -> Iterator[str]:
    """Yield the texts in the result of any function that looks up a name."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _addresses(item)


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
