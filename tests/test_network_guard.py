"""A closed network: no function of Python's sockets reaches out."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dipeo_llm.testing.network_guard import NetworkBlockedError, block_network

OUTSIDE = ("192.0.2.1", 9)
HERE = ("127.0.0.1", 9)


@pytest.fixture
def udp() -> Iterator[socket.socket]:
    """Make a socket that sends to where it is told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        yield made


WAYS: dict[str, Callable[[socket.socket, Any], Any]] = {
    "sendto": lambda udp, to: udp.sendto(b"x", to),
    "sendmsg": lambda udp, to: udp.sendmsg([b"x"], [], 0, to),
    "connect": lambda udp, to: udp.connect(to),
    "connect_ex": lambda udp, to: udp.connect_ex(to),
    "getaddrinfo": lambda _, to: socket.getaddrinfo(host=to[0], port=to[1]),
    "gethostbyname": lambda _, to: socket.gethostbyname(to[0]),
    "gethostbyname_ex": lambda _, to: socket.gethostbyname_ex(to[0]),
    "gethostbyaddr": lambda _, to: socket.gethostbyaddr(to[0]),
    "getfqdn": lambda _, to: socket.getfqdn(to[0]),
    "getnameinfo": lambda _, to: socket.getnameinfo(to, 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_goes_out(udp: socket.socket, way: str) -> None:
    """Every way to send and to look up is refused."""
    with (
        block_network(),
        pytest.raises(NetworkBlockedError, match=r"^refused to .* 192\.0\.2\.1"),
    ):
        WAYS[way](udp, OUTSIDE)


@pytest.mark.parametrize("way", WAYS)
def test_this_machine_is_closed_too_if_asked(udp: socket.socket, way: str) -> None:
    """Without loopback no address is reached."""
    with (
        block_network(allow_loopback=False),
        pytest.raises(NetworkBlockedError, match=r"^refused to .* 127\.0\.0\.1"),
    ):
        WAYS[way](udp, HERE)


@pytest.mark.parametrize("way", WAYS)
def test_this_machine_is_open(udp: socket.socket, way: str) -> None:
    """Each function works on loopback."""
    with block_network():
        WAYS[way](udp, HERE)


def test_a_host_may_be_reached_by_its_name_and_its_addresses(
    udp: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is looked up, and the address that was found is open too."""
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", HERE)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with block_network(allow_loopback=False, allow_hosts=["db.*"]):
        with pytest.raises(NetworkBlockedError):
            udp.connect(HERE)
        socket.getaddrinfo("db.internal", 9)
        udp.connect(HERE)
        with pytest.raises(NetworkBlockedError):
            socket.getaddrinfo("other.internal", 9)


def test_a_socket_that_is_connected_sends(udp: socket.socket) -> None:
    """A message without an address goes to the connected address."""
    with (
        block_network(),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
    ):
        here.bind(("127.0.0.1", 0))
        udp.connect(here.getsockname())

        assert udp.sendmsg([b"one"]) == 3
        assert udp.sendmsg([b"two"], [], 0, None) == 3
        assert (here.recv(9), here.recv(9)) == (b"one", b"two")


def test_everything_is_as_before_afterwards() -> None:
    """Every function is put back."""
    names = [name for name in WAYS if hasattr(socket, name)]
    before = dict(vars(socket.socket)), [getattr(socket, name) for name in names]

    with block_network():
        pass

    after = dict(vars(socket.socket)), [getattr(socket, name) for name in names]
    assert after == before
