"""How many tokens a prompt has, before anyone has counted them.

Without the model's tokenizer this is an estimate from above: one token for three UTF-8 bytes, and a
few for each message's frame. Byte-level BPE vocabularies of today spend about four bytes of English
prose on a token, three to three and a half of source code and JSON, and three (one character) or
more of Chinese or Japanese; so prose is overestimated by about a third, and only text without
structure (base64, long hexadecimal numbers) can need more than the estimate. Give `tokenizer=`
where it must be exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from rlm_runtime.lms.base import Message
from rlm_runtime.replies.pieces import PIECE

BYTES_A_TOKEN = 3
MESSAGE_FRAME = 4  # role and separators
Count = Callable[[str], int]


def estimate(text: str) -> int:
    """Tokens of a text, from above."""
    pieces = (
        [text] if text.isascii() else (text[at : at + PIECE] for at in range(0, len(text), PIECE))
    )
    size = sum(
        len(piece) if piece.isascii() else len(piece.encode("utf-8", "replace")) for piece in pieces
    )
    return -(-size // BYTES_A_TOKEN)


def count(messages: Sequence[Message], text: Count = estimate) -> int:
    """Tokens of a prompt; `text` counts those of one text."""
    total = 0
    for message in messages:
        total += MESSAGE_FRAME + text(message.content)
        for call in message.tool_calls:
            arguments = (
                call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)
            )
            total += MESSAGE_FRAME + text(call.name) + text(arguments)
    return total
