"""What API keys look like, and how a text may spell one.

Pure, and the only list of its kind: it keeps a key out of a message, of a provider's
echo of it, and of a recording.
"""

import base64
import json
import re
from typing import Final
from urllib.parse import quote

# A prefix of a key, and what follows it. The rest asks for a digit and for a length that
# a word does not reach: `sk-toggleable__content` is a class of scikit-learn's HTML.
# Prefixes and lengths as in the rules of gitleaks (https://github.com/gitleaks/gitleaks,
# 2026-11-25) and in the providers' consoles. Nothing looks ahead without a limit, or a
# text of many prefixes ("sk-sk-sk-...") takes time that grows with its square.
_WITH_DIGIT: Final = r"(?=[\w-]{0,255}\d)"
_SHAPES: Final = (
    # OpenAI, Anthropic, DeepSeek, OpenRouter, LiteLLM; Cerebras: csk-.
    (
        r"c?sk-",
        _WITH_DIGIT + r"(?:(?=[\w-]{0,255}[A-Za-z0-9]{12})[\w-]{16,}|[\w-]{40,})",
    ),
    (r"AIza", r"[\w-]{30,}"),  # Google
    (r"AQ\.", r"[\w-]{20,}"),
    (r"ya29\.", r"[\w-]{20,}"),
    (r"gsk_", r"(?=\w{0,255}\d)\w{20,}"),  # Groq
    (r"xai-", r"(?=\w{0,255}\d)\w{20,}"),
    (r"hf_", r"(?=\w{0,255}[A-Z0-9])\w{20,}"),  # Hugging Face
    (r"pplx-", r"(?=\w{0,255}[A-Z0-9])\w{20,}"),  # Perplexity
    (r"r8_", r"(?=\w{0,255}[A-Z0-9])\w{20,}"),  # Replicate
    (r"nvapi-", r"(?=[\w-]{0,255}[A-Z0-9])[\w-]{20,}"),  # NVIDIA
    (r"key-", r"(?=[A-Za-z]{0,255}\d)[A-Za-z0-9]{20,}"),  # Mailgun and others
    (r"fw_", r"(?=\w{0,255}\d)\w{20,}"),  # Fireworks
    (r"tvly-", _WITH_DIGIT + r"[\w-]{20,}"),  # Tavily
    (r"jina_", r"(?=\w{0,255}\d)\w{20,}"),
    (r"lsv2_[ps][tk]_", r"\w{20,}"),  # LangSmith
    (r"ABSK", r"[A-Za-z0-9+/]{100,}"),  # Amazon Bedrock
    (r"(?:AKIA|ASIA)", r"[A-Z0-9]{16}"),  # Amazon
    (r"gh[pousr]_", r"\w{30,}"),  # GitHub
    (r"github_pat_", r"\w{20,}"),
    (r"xox[abprs]-", _WITH_DIGIT + r"[\w-]{10,}"),  # Slack
    (r"[rs]k_(?:live|test)_", r"\w{16,}"),  # Stripe
    (r"eyJ", r"[\w-]{8,1000}\.[\w-]{8,}\.[\w-]{8,}"),  # a JSON Web Token
)

KEY_PARAMETERS: Final = (
    r"(?i:key|api[-_]?key|access_token|token|sig|signature"
    r"|x-amz-(?:signature|credential|security-token))"
)
"""The names of URL parameters that carry a key or a signature, as a regular expression."""

KEY: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    + "|".join(f"{prefix}{rest}" for prefix, rest in _SHAPES)
    + ")",
    re.ASCII,
)
"""Finds keys inside a text."""

_BEGINS_LIKE_KEY: Final = re.compile(
    rf"\b(?:{'|'.join(prefix for prefix, _ in _SHAPES)})|[0-9a-fA-F]{{32}}"
)
_LONGEST_ID: Final = 64

SHORTEST: Final = 8
"""A shorter value may be part of any word."""

_LONGEST_WORD: Final = 16

# What people write where a local server wants a key and reads none, such as "lm-studio".
_PLACEHOLDER_WORDS: Final = frozenset(
    "a an and any anything api apikey bearer changeme cpp default demo dev dummy empty"  # noqa: SIM905 - sixty words read better as text
    " example fake for here ignore ignored is key koboldcpp llama llamacpp llamafile lm"
    " lmstudio local localai localhost missing mock model my n need needed never no"
    " none not nothing null ollama openai or placeholder provided real required sample"
    " secret set sk some string studio test testing the this to token undefined unset"
    " unused use used vllm without x xxx xxxx your".split()
)


def is_like_key(text: str) -> bool:
    """Say whether a text that should be a key's id looks like the key itself.

    A prefix is enough: an id that is shown by mistake cannot be taken back.
    """
    return len(text) > _LONGEST_ID or bool(_BEGINS_LIKE_KEY.search(text))


def is_placeholder(value: str) -> bool:
    """Say whether a key is too short, or too much of a word, to be searched for.

    Such a value, "lm-studio" for one, occurs in ordinary text.
    """
    is_word = len(value) < _LONGEST_WORD and re.fullmatch(
        r"[A-Za-z]?[a-z]+|[A-Z]+", value
    )
    words = re.findall(r"[^\W_]+", value.lower())
    return len(value) < SHORTEST or bool(is_word) or set(words) <= _PLACEHOLDER_WORDS


def spellings(secret: str) -> set[str]:
    """Return the forms in which JSON, JSON inside JSON, and a URL may write a secret.

    Some writers escape a slash in JSON, and some write the hexadecimal digits of a URL
    in lower case (PHP's json_encode; RFC 3986, section 2.1, allows both). An empty
    secret has no forms.
    """
    if not secret:
        return set()
    in_json = json.dumps(secret)[1:-1]
    json_forms = {in_json, in_json.replace("/", "\\/")}
    nested = {
        json.dumps(form)[1:-1].replace("/", slash)
        for form in json_forms
        for slash in ("/", "\\/")
    }
    in_url = quote(secret, safe="")
    lower = re.sub(r"%..", lambda code: code[0].lower(), in_url)
    return {secret, in_url, lower, *json_forms, *nested}


def base64_spellings(secret: str) -> set[str]:
    """Return the parts of a secret's Base64 that do not depend on the text around it.

    There are three alignments in each of the two alphabets. Parts of less than
    `SHORTEST` characters are left out, because they may occur in any data.
    """
    raw = secret.encode()
    forms = set()
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + raw)
        whole = (before + len(raw)) // 3 * 4
        text = encoded[-(-before * 4 // 3) : whole].decode()
        forms |= {text, text.replace("+", "-").replace("/", "_")}
    return {form for form in forms if len(form) >= SHORTEST}


def pattern_of(secrets: set[str]) -> re.Pattern[str] | None:
    """Return a pattern for every spelling of these secrets, or None without secrets.

    A secret of less than `SHORTEST` characters is found only as a whole word: the key
    "a" does not take every "a" out of a sentence.
    """
    forms = {
        rf"(?<![\w-]){re.escape(form)}(?![\w-])"
        if len(secret) < SHORTEST
        else re.escape(form)
        for secret in secrets
        for form in spellings(secret)
    }
    return re.compile("|".join(sorted(forms, key=len, reverse=True))) if forms else None
