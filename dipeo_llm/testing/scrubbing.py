"""Takes secrets out of text that is to be kept, and finds those that are left.

Pure. A secret is a value that was given to `Secrets.learn`, or text that looks like one:
a provider's key, a credential in a field or a URL, the id of a request or of an
organisation.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dipeo_llm.key_shapes import (
    KEY,
    KEY_PARAMETERS,
    base64_spellings,
    is_placeholder,
    spellings,
)

PLACEHOLDER: Final = "[scrubbed]"

REQUEST_HEADERS: Final = frozenset(
    {"accept", "anthropic-beta", "anthropic-version", "content-type"}
)
"""The headers of a request that are kept. A list of harmless headers is complete; a list
of secret ones could never be."""

RESPONSE_HEADERS: Final = re.compile(
    r"content-type|location|retry-after(-ms)?|x-should-retry|x-ms-retry-after-ms"
    r"|(anthropic|x)-ratelimit-[\w-]+|openai-(version|model|processing-ms)"
)
"""The headers of an answer that are kept."""

ID_HEADERS: Final = frozenset(
    {"request-id", "x-request-id", "x-amzn-requestid", "apim-request-id"}
)
"""The headers of an answer that are kept without their value."""

_SECRET_HEADERS: Final = re.compile(
    r".*(authorization|cookie|api[-_]?key|secret|password|credential|auth[-_]?token"
    r"|security-token|organization|helicone-auth|openai-project).*"
    r"|x-goog-api-key|.*request[-_]?id|cf-ray"
)

# A group called "secret" is the part to take out; without one it is all of it.
_CREDENTIAL_FIELDS = (
    r"x-api-key|x-goog-api-key|api[-_]?key|apikey|authorization|access_token"
    r"|refresh_token|client_secret|aws_secret_access_key|secret_access_key"
    r"|aws_session_token|session_token"
)
_PATTERNS: Final = (
    ("an API key", KEY),
    (
        "a token",
        re.compile(
            r"(?i:\b(?:bearer|basic)) +(?P<secret>(?=[^\s\d]*\d)[\w.~+/=-]{12,})",
            re.ASCII,
        ),
    ),
    (
        "a credential",
        re.compile(
            rf'(?i:(?P<q>\\*")(?:{_CREDENTIAL_FIELDS})(?P=q)\s*:\s*(?P=q)'
            r'(?P<secret>[^"\\]+))'
        ),
    ),
    (
        "a credential in a URL",
        re.compile(rf"[?&;]{KEY_PARAMETERS}=(?P<secret>[^&#\s\"'\\]+)", re.ASCII),
    ),
    (
        "a password in a URL",
        re.compile(r"://(?P<secret>[^/@\s:\"'\\]+:[^/@\s\"'\\]+)@", re.ASCII),
    ),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*")),
    (
        "the id of an organisation or a request",
        re.compile(
            r"(?<![A-Za-z0-9])(?:org-|proj_|req_|user-)(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}"
        ),
    ),
    (
        "the id of an organisation or a request",
        re.compile(
            r'(?i:(?P<q>\\*")(?:request_?id|organization_id|org_id)(?P=q)\s*:\s*(?P=q)'
            r'(?P<secret>[^"\\]+))'
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A secret in a text, without its value; its place is counted in bytes of UTF-8."""

    what: str
    start: int
    end: int


class Secrets:
    """The values that must not be kept, and the patterns of those not known yet."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._values: set[str] = set()
        self._forms: re.Pattern[str] | None = None
        self._encoded: re.Pattern[str] | None = None
        for value in values:
            self.learn(value)

    def __repr__(self) -> str:
        return f"Secrets({len(self._values)} values)"

    def __len__(self) -> int:
        return len(self._values)

    def learn(self, value: str) -> None:
        """Remember a value, unless it is so short or so common that it is in any text.

        Such a value is still replaced where a key belongs: in a header, in a URL
        parameter, or in a field such as `api_key`.
        """
        value = value.strip()
        if is_placeholder(value) or value in self._values or value == PLACEHOLDER:
            return
        self._values.add(value)
        self._forms = _any_of(f for v in self._values for f in spellings(v))
        self._encoded = _any_of(f for v in self._values for f in base64_spellings(v))

    def learn_from_environment(
        self, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Remember the values of the environment variables that are named like keys."""
        for name, value in environment.items():
            if _SECRET_VARIABLES.fullmatch(name.upper()):
                self.learn(value)

    def learn_from_headers(self, headers: Mapping[str, str]) -> None:
        """Remember the keys, tokens and cookies of a request."""
        for name, value in headers.items():
            if _SECRET_HEADERS.fullmatch(name.lower()):
                scheme, _, token = value.partition(" ")
                is_scheme = scheme.lower() in {"bearer", "basic", "token"}
                self.learn(token if is_scheme and token else value)

    def find(self, text: str) -> list[Finding]:
        """List the secrets in a text, in order."""
        text = text.encode(errors="surrogatepass").decode("latin-1")
        found = list(self._found(text))
        if self._encoded is not None:
            found += [
                Finding("a key of this run, in Base64", *match.span())
                for match in self._encoded.finditer(text)
            ]
        return sorted(found, key=lambda finding: finding.start)

    def scrub(self, text: str) -> str:
        """Return a text with the placeholder in place of each secret.

        A key in Base64 stays, because the data around it would no longer be Base64;
        `find` reports it.
        """
        return self.scrub_pieces(text.encode(errors="surrogatepass"), ())[0].decode(
            errors="surrogatepass"
        )

    def scrub_pieces(
        self, body: bytes, cuts: Sequence[int]
    ) -> tuple[bytes, tuple[int, ...]]:
        """Scrub a body that arrived in pieces.

        Args:
            body: All of it.
            cuts: The offsets at which pieces end, ascending.

        Returns:
            The body, and the cuts moved along; one that was inside a secret now
            follows it.
        """
        text = body.decode("latin-1")
        out: list[str] = []
        moved = list(cuts)
        done = shift = 0
        for finding in sorted(self._found(text), key=lambda f: (f.start, -f.end)):
            start = max(finding.start, done)
            if start >= finding.end:
                continue
            # Two secrets that overlap, such as a key in a URL, become one placeholder.
            if start > finding.start and out and out[-1] == PLACEHOLDER:
                shift -= finding.end - start
            else:
                out += [text[done:start], PLACEHOLDER]
                shift += len(PLACEHOLDER) - (finding.end - start)
            end = finding.end
            moved = [
                _moved(cut, new, start, end, shift)
                for cut, new in zip(cuts, moved, strict=True)
            ]
            done = end
        return "".join([*out, text[done:]]).encode("latin-1"), tuple(moved)

    def _found(self, text: str) -> Iterator[Finding]:
        if self._forms is not None:
            for match in self._forms.finditer(text):
                yield Finding("a key of this run", *match.span())
        for what, pattern in _PATTERNS:
            group = "secret" if "secret" in pattern.groupindex else 0
            for match in pattern.finditer(text):
                if match[group] != PLACEHOLDER:
                    yield Finding(what, *match.span(group))


_SECRET_VARIABLES: Final = re.compile(
    r".*_(API_KEY|SECRET_ACCESS_KEY|SESSION_TOKEN|ACCESS_TOKEN|AUTH_TOKEN)"
)


def is_secret_header(name: str) -> bool:
    """Say whether the value of a header of this name must not be in a file."""
    return bool(_SECRET_HEADERS.fullmatch(name.lower()))


def join_events(body: str) -> list[str]:
    """Join the text of each field over all events of a stream.

    A model that repeats a key does so in pieces, none of which is a key by itself.
    """
    texts: dict[str, list[str]] = {}
    for line in body.splitlines():
        data = line.removeprefix("data:").strip()
        if data.startswith("{"):
            try:
                event = json.loads(data)
            except ValueError:
                continue
            for path, text in _texts(event):
                texts.setdefault(path, []).append(text)
    return ["".join(pieces) for pieces in texts.values() if len(pieces) > 1]


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")


def _moved(cut: int, new: int, start: int, end: int, shift: int) -> int:
    if cut >= end:
        return cut + shift
    return end + shift if cut > start else new


def _any_of(forms: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(forms), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    # The texts are UTF-8 read as Latin-1: one character for each byte.
    return re.compile(pattern.encode().decode("latin-1")) if pattern else None
