"""Is this Python, and can it be made so? Judged by the grammar; nothing is ever executed."""

from __future__ import annotations

import ast
import functools
import html
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator

from rlm_runtime.replies import model_json
from rlm_runtime.replies.thinking import SPECIAL, without_last_tokens

# characters above which a text is taken on trust: a syntax tree takes 2 us and 500 bytes for each
LARGE = 40_000
MOST = 120_000  # characters of all syntax trees of a reply, however long it is


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Effort(model_json.Effort):
    """Characters of work left for one reply, so that a hostile one costs linear time: past it,
    plain guesses decide."""

    def __init__(self, length: int):
        super().__init__(min(8 * length + 4_000, MOST))
        self.known: dict[str, bool] = {}  # judged already


def tree(code: str) -> ast.Module | None:
    """The syntax tree, or None where the text is no Python (or too large or too nested to say)."""
    if len(code) > LARGE:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a cell is the cell's business
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None


def parses(code: str, effort: Effort | None = None) -> bool:
    """Whether `code` is Python; a text too large to judge passes."""
    if len(code) > LARGE:
        return True
    if effort is None:
        return tree(code) is not None
    if code not in effort.known:
        if not effort.spend(len(code)):
            return True
        effort.known[code] = tree(code) is not None
    return effort.known[code]


LINE_OF_CODE = re.compile(
    r"""[ \t]*+(?:import[ ]\w|from[ ][\w.]++[ ]import\b|(?:async[ ])?+(?:def|class|with|for|while|if|elif)\b.*+:?$(?<=:)
    |(?:else|try|finally)[ ]*+:|except\b.*+$(?<=:)|return\b|print\(|[\w.]++(?:\[.*?\])?+[ ]*+[-+*/|&]?=(?!=)|answer\[
    |(?:llm|rlm)_\w++\(|FINAL(?:_VAR)?\(|SHOW_VARS\(|await[ ]\w|assert[ ]\w|raise[ ]\w|@\w)""",
    re.VERBOSE,
)


def line_share(text: str) -> float:
    """The share of lines that have the look of Python statements."""
    lines = [line for line in text.split("\n")[:200] if line.strip()]
    return (
        sum(bool(LINE_OF_CODE.match(line[:500])) for line in lines) / len(lines) if lines else 0.0
    )


def is_code(text: str, effort: Effort | None = None) -> bool:
    """Whether a text that does not say what it is was meant as a cell.

    Words, numbers, tables and JSON parse as Python too ("Yes", "42", "a, b", "total: n"), so
    something must be done in it: a call, an assignment, an import, a loop. Broken Python counts
    where many of its lines look like statements.
    """
    if not text.strip():
        return False
    if len(text) > LARGE or (effort is not None and not effort.spend(len(text))):
        return line_share(text) >= 0.3
    module = tree(text)
    if module is None:
        return line_share(text) >= 0.3
    return any(_acts(statement) for statement in module.body)


def _acts(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        value = node.value.value if isinstance(node.value, ast.Await) else node.value
        return isinstance(value, ast.Call | ast.ListComp | ast.Subscript | ast.JoinedStr)
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    return not isinstance(node, ast.Pass | ast.Break | ast.Continue)


# Comments and strings, enough of the lexer to know whether a place in the text lies inside a
# string.
TOKEN = re.compile(
    r"""\#[^\n]*+ | (?P<triple>\"\"\"|''')
    | "[^"\\\n]*+(?:\\.[^"\\\n]*+)*"?+ | '[^'\\\n]*+(?:\\.[^'\\\n]*+)*'?+""",
    re.VERBOSE | re.DOTALL,
)


def _triple_end(text: str, quotes: str, start: int, end: int) -> int:
    """Where the string that opened just before `start` ends, or -1."""
    at = text.find(quotes, start, end)
    while at >= 0:
        slashes = at
        while slashes > start and text[slashes - 1] == "\\":
            slashes -= 1
        if (at - slashes) % 2 == 0:
            return at + 3
        at = text.find(quotes, at + 1, end)
    return -1


ENDS = re.compile(r"\s*+(?:</(?!(?:antml:)?parameter>)|<(?:antml:)?parameter[ =]|\Z)")


def outside_strings(
    text: str, start: int, end: int, places: Iterator[re.Match[str]]
) -> re.Match[str] | None:
    """The first of `places` (in order, from `start` on) that is not inside a string or comment of
    the code there.

    One walk over the text however many places there are. A place in a comment is taken where
    another closing tag follows it, or where there is no better one: "x = 1 # note</code>".
    """
    cursor, commented = start, None
    for place in places:
        while cursor < place.start():
            token = TOKEN.search(text, cursor, place.start())
            if token is None:
                cursor = place.start()
                break
            # whole, where the search's bound had cut it
            token = TOKEN.match(text, token.start(), end) or token
            cursor = token.end()
            if token["triple"]:
                cursor = _triple_end(text, token["triple"], cursor, end)
                if cursor < 0:
                    return commented
            elif cursor > place.start() and token[0][0] == "#":
                if ENDS.match(text, place.end()):
                    return place
                commented = commented or place
        if cursor <= place.start():
            return place
    return commented


QUOTES = str.maketrans(
    {"“": '"', "”": '"', "„": '"', "‟": '"', "‘": "'", "’": "'", "‚": "'", "′": "'", "″": '"'}
)
BLANKS = str.maketrans(
    {"\u00a0": " ", "\u200b": None, "\u200c": None, "\u200d": None, "\ufeff": None, "\u2060": None}
)
PROMPT = re.compile(r"^[ \t]*+>>>(?: |$)", re.M)
MAGIC = re.compile(r"[ \t]*+(?:%%?[a-zA-Z]\w*+.*+|\?\w++|\w++\?)$")
SHELL = re.compile(
    r"[ \t]*+(?:!|%(?:pip|sh|bash|conda|system)\b|pip3?+ install |apt(?:-get)? install )"
)


def without_prompts(code: str) -> tuple[str, bool]:
    """A pasted interpreter session as its input lines; True where it held output lines too."""
    kept, output, continued = [], False, False
    for line in code.split("\n"):
        bare = line.lstrip()
        if PROMPT.match(line):
            kept.append(bare[4:])
            continued = True
        elif continued and bare.startswith("..."):
            kept.append(bare[4:])
        else:
            continued = False
            output |= bool(bare)
    return "\n".join(kept), output


def _dedent(code: str) -> str:
    first, _, rest = code.partition("\n")
    whole = textwrap.dedent(code)
    if whole != code or not rest:
        return whole.strip(" \t") if not rest else whole
    # the first line stood beside the opening of the block
    return first.lstrip() + "\n" + textwrap.dedent(rest)


def _without_magic(code: str) -> str:
    return "\n".join("" if MAGIC.match(line) else line for line in code.split("\n"))


FINAL_LINE = re.compile(r"^[ \t]*+FINAL(?:_VAR)?\(", re.M)
RAW_CONTENT = re.compile(r"""^([ \t]*+answer\[["']content["']\][ \t]*+=[ \t]*+)([^\n]++)$""", re.M)


def _quoted_final(code: str, effort: Effort) -> str:
    """FINAL(plain words) and answer["content"] = plain words, with the quotes the model left
    out."""
    call = FINAL_LINE.search(code)
    if call:
        words = code[call.end() :].rstrip(" \t\n;.")
        if words.endswith(")") and not parses(f"({words}", effort):
            code = f"{code[: call.start()]}FINAL({words[:-1].strip()!r})"
    return RAW_CONTENT.sub(
        lambda m: m[1] + (m[2] if parses(f"({m[2]})", effort) else repr(m[2].strip())), code
    )


REPAIRS: tuple[Callable[[str], str], ...] = (
    _dedent,
    lambda code: without_prompts(code)[0] if PROMPT.search(code) else code,
    html.unescape,
    without_last_tokens,
    lambda code: SPECIAL.sub("", code),
    lambda code: code.translate(BLANKS),
    lambda code: code.translate(QUOTES),
    _without_magic,
)


def repaired(code: str, effort: Effort) -> str:
    """`code` itself where it parses; else with the repairs, tried in turn on top of each other,
    that make it parse; else `code` again: the REPL's own SyntaxError is the best message."""
    if parses(code, effort):
        return code
    current = code
    repairs: tuple[Callable[[str], str], ...] = (
        *REPAIRS,
        functools.partial(_quoted_final, effort=effort),
    )
    for repair in repairs:
        changed = repair(current)
        if changed == current:
            continue
        if effort.left <= 0:
            break
        if parses(changed, effort):
            return changed
        current = changed
    return code
