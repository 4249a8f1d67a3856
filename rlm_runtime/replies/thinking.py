"""A model's reply without its thinking: thinking tags, harmony channels, a lone closing tag, tokens
that end a reply.

The vocabulary of all readers of replies stands here. `clean` is for replies that are text;
`parsing` reads the replies of a root, where the same tags may stand inside of code. Sources: the
chat templates of DeepSeek-R1, Qwen3, QwQ, Magistral, Kimi-VL, Seed-OSS, OpenThinker and the harmony
format of gpt-oss.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import islice

NAMES = "think|thinking|reasoning|thought|scratchpad"
OPEN = re.compile(rf"<(?:{NAMES}|seed:think)>|\[THINK\]|◁think▷|<\|begin_of_thought\|>", re.I)
CLOSE = re.compile(rf"</(?:{NAMES}|seed:think)>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>", re.I)

# A message of the harmony format. Its receiver ("to=python") stands behind the role or behind the
# channel.
HEADER = re.compile(
    r"(?:<\|start\|>(?P<role>[^<\n]{0,100}+))?<\|channel\|>(?P<channel>\w{1,20}+)"
    r"(?P<rest>[^<\n]{0,100}+(?:<\|constrain\|>[^<\n]{0,20}+)?)<\|message\|>"
)
RECEIVER = re.compile(r"to=([\w.]{1,80}+)")
MESSAGE_END = re.compile(r"<\|(?:end|call|return|start|channel)\|>")
# The same where an endpoint has dropped the special tokens: "analysisI add them
# up.assistantfinal42".
_BARE = re.compile(r"\A\s*+analysis(?=[A-Z\s])")
_BARE_FINAL = re.compile(r"assistant(?:<\|channel\|>)?final")

SPECIAL = re.compile(
    r"<\|[a-z_▁ ]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|<(?:end|start)_of_turn>|<end_code>|\[/?INST\]|<\|(?:start|end)_header_id\|>"
)
_FIRST = re.compile(rf"\A(?:\s*+(?:{SPECIAL.pattern}))++")
# openings and closings of one reply that are told apart; what is behind them stays as it is
TAGS = 10_000
_QUOTES = ("`", '"', "'")
_FENCE = re.compile(r"^[ \t]*+(`{3,16}+|~{3,16}+)([^\n`]*+)$", re.M)


@dataclass(frozen=True)
class Cleaned:
    """`text` is the reply itself, `thinking` what was taken out of it; `open` where the reply ends
    inside its thinking (then `text` is what stood before it: mostly nothing)."""

    text: str
    thinking: str = ""
    open: bool = False


def clean(reply: str) -> Cleaned:
    """A reply of text without its thinking. Linear; a reply that holds none comes back as it is,
    but for a last token.

    A tag inside a fence, in quotes, or among words with its partner on the same line is a mention,
    and stays.
    """
    found = harmony(reply)
    text = found.text
    # behind the final message the model plays other turns
    if text is not reply and not HEADER.match(text):
        text = MESSAGE_END.split(text, maxsplit=1)[0]
    inner = _untagged(text)
    text = without_last_tokens(inner.text)
    thinking = _joined([found.thinking, inner.thinking])
    open_ = inner.open or (found.open and not text.strip())
    if inner.text != reply:
        text = _FIRST.sub("", text).strip()
    return Cleaned(text, thinking, open_)


def harmony(reply: str) -> Cleaned:
    """Harmony messages as plain text, up to the end of the final one or the first call: the
    analysis is thinking, the headers go. A call stays as it is, header and all."""
    if _BARE.match(reply):
        final = _BARE_FINAL.search(reply)
        if final is None:
            return Cleaned(reply)
        return Cleaned(
            reply[final.end() :].strip(),
            reply[: final.start()].strip().removeprefix("analysis").strip(),
        )
    header = HEADER.search(reply, 0, 400)
    if header is None or SPECIAL.sub("", reply[: header.start()]).strip() not in ("", "assistant"):
        return Cleaned(reply)
    preambles: list[str] = []
    thinking: list[str] = []
    open_ = False
    at = 0
    while header is not None:
        role = (header["role"] or "assistant").strip()
        if not role.startswith("assistant") or RECEIVER.search(f"{role} {header['rest']}"):
            break
        if header["channel"].lower() == "final":
            preambles, at = [], header.end()
            break
        end = MESSAGE_END.search(reply, header.end())
        stop = end.start() if end else len(reply)
        at = stop if end is None or end[0] in ("<|start|>", "<|channel|>") else end.end()
        analysis = header["channel"].lower() == "analysis"
        (thinking if analysis else preambles).append(reply[header.end() : stop])
        open_ = analysis and end is None
        header = HEADER.match(reply, at)
    return Cleaned("\n".join([*preambles, reply[at:]]), _joined(thinking), open_)


def _untagged(text: str) -> Cleaned:
    closings: dict[str, list[re.Match[str]]] = {}
    for closing in islice(CLOSE.finditer(text), TAGS):
        closings.setdefault(closing[0].lower(), []).append(closing)
    openings = list(islice(OPEN.finditer(text), TAGS))
    if not closings and not openings:
        return Cleaned(text)
    starts = {tag: [c.start() for c in found] for tag, found in closings.items()}
    marks = sorted(
        [*openings, *(c for found in closings.values() for c in found)], key=lambda m: m.start()
    )
    fences = _fences(text)
    kept: list[str] = []
    thinking: list[str] = []
    at = 0  # all before it is dealt with
    mentioned = 0  # where a pair that is only mentioned ends
    fenced = False  # there is a fence in `kept` behind the first thinking
    for mark in marks:
        start, end = mark.span()
        if start < max(at, mentioned) or _quoted(text, start, end) or _inside(fences, start):
            continue
        if CLOSE.match(mark[0]):  # alone: its opening stands in the prompt, or it is one too many
            fenced = bool(thinking) and (fenced or _inside(fences, at, start))
            (kept if fenced else thinking).append(text[at:start])
            if not fenced:
                thinking[:0], kept = kept, []
            at = end
            continue
        partner = _partner(mark[0], end, closings, starts)
        line = text.rfind("\n", max(0, start - 200), start) + 1
        if text[max(line, at, start - 200) : start].strip() and (
            partner is None or text.find("\n", end, min(partner.start(), end + 2_000)) < 0
        ):
            mentioned = end if partner is None else partner.end()
            continue
        kept.append(text[at:start])
        if partner is None:
            return Cleaned("".join(kept), _joined([*thinking, text[end:]]), open=True)
        fenced = fenced or (bool(thinking) and _inside(fences, at, start))
        thinking.append(text[end : partner.start()])
        at = partner.end()
    return Cleaned("".join(kept) + text[at:], _joined(thinking))


def closing_tag(opening: str) -> str:
    """The tag, in small letters, that ends what `opening` begins."""
    tag = opening.lower().replace("begin_of", "end_of")
    return tag if tag[1] == "|" else f"{tag[0]}/{tag[1:]}"


def _partner(
    opening: str, end: int, closings: dict[str, list[re.Match[str]]], starts: dict[str, list[int]]
) -> re.Match[str] | None:
    """The first closing tag of an opening tag from `end` on."""
    tag = closing_tag(opening)
    i = bisect_left(starts.get(tag, ()), end)
    return closings[tag][i] if i < len(starts.get(tag, ())) else None


def _joined(thoughts: list[str]) -> str:
    return "\n\n".join(filter(None, (t.strip() for t in thoughts)))


def _quoted(text: str, start: int, end: int) -> bool:
    return text[max(0, start - 1) : start] in _QUOTES or text[end : end + 1] in _QUOTES


def _fences(text: str) -> list[tuple[int, int]]:
    """Where closed fences begin and end."""
    spans: list[tuple[int, int]] = []
    opening: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        if opening is None:
            opening = line
        elif (
            line[1][0] == opening[1][0] and len(line[1]) >= len(opening[1]) and not line[2].strip()
        ):
            spans.append((opening.start(), line.end()))
            opening = None
    return spans


def _inside(fences: list[tuple[int, int]], at: int, stop: int | None = None) -> bool:
    """Whether `at` lies in a fence; with `stop`, whether one ends between them."""
    i = bisect_left(fences, (at + 1,)) - 1
    if i >= 0 and at < fences[i][1]:
        return True
    return stop is not None and i + 1 < len(fences) and fences[i + 1][1] <= stop


def without_last_tokens(text: str) -> str:
    """Without the special tokens a reply ends with, and the blanks around them."""
    end = _last_printed(text, len(text))
    first = True
    while end:
        start = max(text.rfind("<", max(0, end - 80), end), text.rfind("[", max(0, end - 80), end))
        if start < 0 or not SPECIAL.fullmatch(text, start, end):
            break
        end, first = _last_printed(text, start), False
    return text if first else text[:end]


def _last_printed(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end
