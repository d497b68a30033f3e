"""The internet of the providers on loopback: a proxy that is every provider's server.

A client that trusts its authority and uses it as its proxy reaches any host here, over
TLS, at the provider's own address. Without the proxy it is a server of plain HTTP on
loopback. All answers have the format of OpenAI's chat completions.
"""

import asyncio
import json
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import trustme

TEXT = "Hello from the loopback."
USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1}'},
}


@dataclass(slots=True)
class Request:
    """A request as it arrived."""

    host: str
    """The host that was asked for; empty without the proxy."""
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(slots=True)
class Reply:
    """What the servers answer."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    message: Mapping[str, Any] | None = None
    """The message of the choice; None is a text, or a call if tools were offered."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the answer."""
    body: Any = None
    """The whole JSON instead."""
    events: Iterable[Any] | None = None
    """The events of a stream instead."""
    cuts: bool = False
    """Whether a stream ends before its finish reason."""


class World:
    """An async context manager.

    Args:
        folder: Where the certificate of the authority is written.
        hosts: The names that the servers have.
    """

    ports: ClassVar[set[int]] = set()
    """Where one has listened."""

    def __init__(self, folder: Path, hosts: Iterable[str] = ()) -> None:
        self.requests: list[Request] = []
        self.reply = Reply()
        authority = trustme.CA()
        self.ca_bundle = folder / "world.pem"
        authority.cert_pem.write_to_path(self.ca_bundle)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", *sorted(set(hosts))).configure_cert(self._tls)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def origin(self) -> str:
        """Its URL on loopback, as a proxy and as a server."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.ports.add(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host = ""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, target, headers = _parse(head)
                if method == "CONNECT":
                    host = target.removesuffix(":443")
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    await writer.start_tls(self._tls)
                    continue
                length = int(headers.get("content-length", 0))
                body = json.loads(await reader.readexactly(length) or b"null")
                self.requests.append(Request(host, method, target, headers, body))
                asked = body or {}
                is_stream = "alt=sse" in target or bool(asked.get("stream"))
                writer.write(self._answer(asked, is_stream))
                await writer.drain()
                if self.reply.cuts:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass  # the client has closed the connection
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            writer.close()

    def _answer(self, asked: Mapping[str, Any], is_stream: bool) -> bytes:
        reply = self.reply
        if reply.status != 200:
            error = {"message": f"status {reply.status}", "type": "t", "code": None}
            return _pack(reply.status, reply.headers, reply.body or {"error": error})
        if reply.body is not None:
            return _pack(200, reply.headers, reply.body)
        message = reply.message or (
            {"role": "assistant", "content": None, "tool_calls": [CALL]}
            if asked.get("tools")
            else {"role": "assistant", "content": TEXT}
        )
        head = {"id": "chatcmpl-1", "created": 1, "model": asked.get("model", "m")}
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        if not is_stream:
            choice = {"index": 0, "message": message, "finish_reason": finish}
            whole = {"object": "chat.completion", "choices": [choice], "usage": USAGE}
            return _pack(200, reply.headers, {**head, **whole, **reply.more})
        head["object"] = "chat.completion.chunk"
        events = reply.events
        if events is None:
            calls = [
                {"index": i, **c} for i, c in enumerate(message.get("tool_calls", ()))
            ]
            delta = {**message, "tool_calls": calls} if calls else message
            events = [
                {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            ]
            if not reply.cuts:
                end = {"index": 0, "delta": {}, "finish_reason": finish}
                events += [{"choices": [end], "usage": USAGE, **reply.more}]
        lines = [f"data: {json.dumps({**head, **event})}\n\n" for event in events]
        if not reply.cuts:
            lines.append("data: [DONE]\n\n")
        return _pack(
            200, {"content-type": "text/event-stream"}, "".join(lines).encode()
        )


def _parse(head: bytes) -> tuple[str, str, dict[str, str]]:
    line, *rest = head.decode().split("\r\n")[:-2]
    method, target, _ = line.split(" ", 2)
    pairs = (header.split(":", 1) for header in rest)
    return method, target, {name.lower(): value.strip() for name, value in pairs}


def _pack(status: int, headers: Mapping[str, str], body: Any) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content-type": "application/json", **headers}
    fields["content-length"] = str(len(data))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + data
