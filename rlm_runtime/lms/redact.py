"""Keys do not belong into messages, logs or trajectories: they are replaced by `***`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

# of a secret: shorter ones ("EMPTY", "none") are placeholders and parts of ordinary words
SHORTEST = 6
_NAMED_LIKE_A_KEY = re.compile(
    r"key|token|secret|passw|credential|auth|cookie|signature|^sig$|^code$", re.I
)
_FORMS = (  # of keys that are not ours: an endpoint's message may quote any
    (re.compile(r"\b(sk|pk|key|gsk|xai|nvapi|rk)([-_])[A-Za-z0-9_*-]{8,}"), r"\1\2***"),
    (re.compile(r"\b(AIza|hf_|r8_|fw_|tgp_|ghp_|github_pat_)[A-Za-z0-9_-]{16,}"), r"\1***"),
    (re.compile(r"\b(Bearer|Basic)( +)[A-Za-z0-9._~+/=-]{8,}", re.I), r"\1\2***"),
    (
        re.compile(
            r"([?&](?:api[-_]?key|key|access_token|token|sig|code)=)[^&\s\"'<>]{1,4096}", re.I
        ),
        r"\1***",
    ),
    (re.compile(r"(://)[^/\s@]{1,512}@"), r"\1***@"),
)


class Redactor:
    """Replaces given secrets, also as URLs and JSON escape them, and whatever looks like a key."""

    def __init__(self, secrets: Iterable[str | None] = ()):
        forms = {f for s in secrets if s and len(s) >= SHORTEST for f in _spellings(s)}
        self._secrets = tuple(sorted(forms, key=len, reverse=True))

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for form, put in _FORMS:
            text = form.sub(put, text)
        return text


def _spellings(secret: str) -> set[str]:
    escaped = json.dumps(secret)[1:-1]
    return {
        secret,
        quote(secret, safe=""),
        quote_plus(secret),
        escaped,
        escaped.replace("/", "\\/"),
    }


def is_secret_name(name: str) -> bool:
    """Whether a header, query field or variable of this name is likely to hold a key."""
    return bool(_NAMED_LIKE_A_KEY.search(name))


def foreign(text: str) -> str:
    """The message of code that is not ours (an LM or tool of the user's), without the keys of this
    environment."""
    held = (v for n, v in os.environ.items() if len(v) >= 8 and is_secret_name(n))
    return Redactor(held)(text)
