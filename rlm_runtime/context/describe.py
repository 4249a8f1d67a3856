"""What the root is told of a context: type, size, structure, and a bounded preview that is
quoted."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from rlm_runtime.context.files import LAZY_BYTES, SAMPLE, decoded, last_text, opened, without_mark

if TYPE_CHECKING:
    from rlm_runtime.context import Context

LISTED = 24  # files, keys or elements named


def preview(context: Context, limit: int = 1400) -> str:
    """The beginning and the end, quoted as Python literals: nothing in it can pass for the
    runtime's own words."""
    if context.kind == "folder":
        return ""
    head, tail, whole = ends(context, limit * 5 // 7, limit - limit * 5 // 7)
    if whole:
        return f"The whole of it: {quoted(head, limit)}"
    return f"Begins: {quoted(head, limit * 5 // 7)}\nEnds: {quoted(tail, limit - limit * 5 // 7, end=True)}"


def ends(context: Context, head: int, tail: int) -> tuple[Any, Any, bool]:
    if context.kind == "file":
        return file_ends(context, head, tail)
    value = (
        context.value
        if context.kind in ("str", "bytes")
        else context._json.decode("utf-8", "surrogatepass")
    )
    return (
        value[:head],
        value[-tail:] if tail else value[:0],
        len(value) <= head + tail and head >= len(value),
    )


def file_ends(context: Context, head: int, tail: int) -> tuple[str, str, bool]:
    if context.compression:
        with opened(context.location, context.compression) as source:
            text = without_mark(decoded(source.read(4 * head + 4), context.encoding))
        return text[:head], "(not read: the file is compressed)", False
    size = context.bytes or 0  # None only where it is compressed
    if size <= SAMPLE:
        text = context._small_text
        return text[:head], text[-tail:] if tail else "", len(text) <= head
    with open(context.location, "rb") as file:
        begin = without_mark(decoded(file.read(4 * head + 4), context.encoding))
        end = last_text(file, size, 4 * tail + 4, context.encoding)
    return begin[:head], end[-tail:] if tail else "", False


def brief(context: Context, limit: int) -> str:
    """One line: "str, 31,234 characters: 'The grass is'"."""
    if context.kind == "folder":
        names = ", ".join(quoted(path, 40) for path, _, _ in context.listing[:4])
        return f"Folder of {len(context.listing):,} files: {names}"
    if context.kind in ("list", "dict", "messages"):
        return f"{'dict' if context.kind == 'dict' else 'list'} of {len(context.value):,}: {quoted(ends(context, limit, 0)[0], limit)}"
    what = "bytes" if context.kind == "bytes" else "str"
    size = (
        f"{context.chars:,} characters" if context.chars is not None else f"{context.bytes:,} bytes"
    )
    return f"{what}, {size}: {quoted(ends(context, limit, 0)[0], limit)}"


def facts(context: Context, name: str = "context") -> list[str]:
    of_kind = {
        "str": text_facts,
        "bytes": bytes_facts,
        "list": list_facts,
        "dict": dict_facts,
        "messages": message_facts,
        "file": file_facts,
        "folder": folder_facts,
    }
    return of_kind[context.kind](context, name)


def size(context: Context) -> str:
    chars = f"{context.chars:,} characters, " if context.chars is not None else ""
    return f"{chars}{context.bytes:,} bytes, about {context.tokens:,} tokens"


def bytes_facts(context: Context, name: str) -> list[str]:
    return [f"Type: bytes. {context.bytes:,} bytes."]


def text_facts(context: Context, name: str) -> list[str]:
    source = f"It is {context.about}. " if context.about else ""
    return [f"Type: str. {source}{size(context)}, {context.value.count(chr(10)) + 1:,} lines."]


def list_facts(context: Context, name: str) -> list[str]:
    types = Counter(type(e).__name__ for e in context.value)
    facts = [
        f"Type: list of {len(context.value):,} elements ({counted(types)}). As JSON {size(context)}."
    ]
    lengths = sorted(len(e) for e in context.value if isinstance(e, str | list | dict))
    if lengths:
        facts.append(
            f"Length of the elements: {lengths[0]:,} to {lengths[-1]:,}, median {lengths[len(lengths) // 2]:,}."
        )
    dicts = [e for e in context.value[:1000] if isinstance(e, dict)]
    if dicts:
        keys = Counter(k for e in dicts for k in list(e)[:100])
        named = [repr(k[:80]) for k, _ in keys.most_common(LISTED)]
        facts.append(f"Keys of the dicts: {', '.join(named)}{more(len(keys))}.")
    return facts


def dict_facts(context: Context, name: str) -> list[str]:
    facts = [f"Type: dict of {len(context.value):,} keys. As JSON {size(context)}."]
    named = [f"{k[:80]!r}: {sketch(v)}" for k, v in list(context.value.items())[:LISTED]]
    return [*facts, f"Keys: {'; '.join(named)}{more(len(context.value))}."]


def message_facts(context: Context, name: str) -> list[str]:
    roles = Counter(m["role"][:40] for m in context.value)
    last = context.value[-1]
    return [
        f"Type: list of {len(context.value):,} chat messages, dicts with 'role' and 'content' ({counted(roles)}). "
        f"As JSON {size(context)}.",
        f"The last one is of {last['role'][:40]!r}: {sketch(last.get('content'))}.",
    ]


def file_facts(context: Context, name: str) -> list[str]:
    label = quoted(context.location.name, 200)
    if context.compression:
        packed = context.location.stat().st_size
        return [
            f"Type: text of the file {label}, {packed:,} bytes with {context.compression}; unpacked in the REPL."
        ]
    if context.measure is not None:
        return [
            f"Type: str, the text of the file {label}. {size(context)}, {context.measure.lines:,} lines."
        ]
    with open(context.location, "rb") as file:
        sample = file.read(1 << 20)
    lines = round(sample.count(b"\n") * (context.bytes or 0) / len(sample))
    return [
        f"Type: Text, the text of the file {label}, read lazily. {size(context)}, about {lines:,} lines.",
        "A Text has the methods of str (len, slices, find, count, startswith, ...; a slice is a str) and "
        f"works with re.search, re.finditer and re.findall; {name}.lines() and {name}.chunks(size, overlap) go "
        "through it piece by piece.",
    ]


def folder_facts(context: Context, name: str) -> list[str]:
    found, files = context.survey, context.listing
    endings = Counter(os.path.splitext(path)[1] or "no ending" for path, _, _ in files)
    what = "folder" if context.files is None else "set of files"
    facts = [
        f"Type: Folder, a mapping of path to text, from a {what}: {len(files):,} files, {context.bytes:,} bytes, "
        f"about {context.tokens:,} tokens ({counted(endings)}).",
        f"{name}['path'] reads a file as str (one of more than {LAZY_BYTES >> 20} MiB as a lazy text with the methods of "
        f"str); also {name}.glob('**/*.py'), {name}.grep(pattern), {name}.size(path), {name}.walk().",
        *found.left_out(),
    ]
    if found.skipped:
        facts.append(
            f"{name}.skipped holds the names of files left out, and why; {name}.bytes(path) gives their bytes, "
            f"{name}.text(path, encoding=...) decodes them."
        )
    tops: Counter[str] = Counter()
    for path, _, size in files:
        if "/" in path:
            tops[path.split("/")[0] + "/"] += size
    if len(files) > LISTED and tops:
        named = [f"{quoted(t, 80)} {size:,} bytes" for t, size in tops.most_common(LISTED)]
        facts.append(f"Folders at the top: {', '.join(named)}{more(len(tops))}.")
    named = [f"{quoted(path, 120)} ({size:,} bytes)" for path, _, size in files[:LISTED]]
    return [*facts, f"Files: {', '.join(named)}{more(len(files))}."]


def sketch(value: Any) -> str:
    if isinstance(value, str):
        return f"str of {len(value):,} characters" if len(value) > 60 else repr(value)
    if isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of {len(value):,}"
    return repr(value)[:60]


def counted(counts: Counter[str]) -> str:
    named = [f"{n:,} {what}" for what, n in counts.most_common(8)]
    return ", ".join(named) + more(len(counts), 8)


def more(total: int, shown: int = LISTED) -> str:
    return f", ... {total - shown:,} more" if total > shown else ""


def quoted(value: str | bytes, limit: int, end: bool = False) -> str:
    """As a Python literal, which escapes line ends, control and direction characters; cut to
    `limit` characters."""
    value = value[-limit:] if end else value[:limit]
    text = repr(value)
    while len(text) > 2 * limit + 20 and value:  # mostly escapes: cut again, a preview is bounded
        value = value[len(value) // 4 :] if end else value[: len(value) - len(value) // 4 - 1]
        text = repr(value)
    return text
