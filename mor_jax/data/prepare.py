"""A corpus becomes token rows on disk: once, in resumable steps, never half-read.

    <cache>/data/<fingerprint>/ complete: prepared.json, tokenizer.json, rows/ (a TFDS data set);
                                       of conversations also chat_template.jinja
    <cache>/data/<fingerprint>.work/   under way: plan.json, tokenizer.json, parts/, out/
    <cache>/data/<fingerprint>.lock

The fingerprint covers the corpus, the tokenizer, the context, the held-out share and the format, so
a cache that no longer fits is never found. The last step is the rename of work/out to its final
name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from mor_jax.config import DataConfig
from mor_jax.data.builder import StoredRows, write_rows
from mor_jax.data.chat import FILE as TEMPLATE_FILE
from mor_jax.data.chat import ChatTemplate, Sample, build_template, find_template
from mor_jax.data.documents import Document, HashMemo, TextSource, digest_of
from mor_jax.data.holdout import HoldoutPlan, HoldoutSurvey, nonempty, place
from mor_jax.data.mixture import Mixture, Picked
from mor_jax.data.packing import (
    Encode,
    Encoded,
    Row,
    pack,
    pack_whole,
    read_documents,
    read_part,
    write_parts,
)
from mor_jax.data.progress import progress, say
from mor_jax.data.sources import open_source
from mor_jax.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import ConfigError, DataError
from mor_jax.paths import as_path, is_local

try:
    import fcntl
except ImportError:  # Windows: the atomic renames still keep a cache whole, work may be done twice
    fcntl = None  # type: ignore[assignment]  # read as such below


FORMAT = 2  # of the cache; raise it when any step here changes what is written
BPE_SAMPLE_BYTES = 256 << 20  # of text the BPE is trained on; more changes few merges
SPLITS = {"train": False, "validation": True}  # name: held out
MANIFEST = "prepared.json"


@dataclass(frozen=True)
class PreparedData:
    """Rows of both splits, read on demand.

    stats: {"train": {...}, "validation": {...}, "note": str, "source": str, "skipped_files": int,
    "skipped_records": int, "duplicates": int, "crossing": int, "dropped": int} with, for each
    split, documents, tokens (bos and eos included), bytes (UTF-8 text) and rows; the last three as
    in `HoldoutPlan`. Of conversations also, for each split, trained (tokens with a loss) and
    skipped (conversations of which no weighted message fits a row). `note` says what is unusual
    about the split; else it is empty.
    """

    train: StoredRows | Mixture
    validation: StoredRows | Picked
    tokenizer: Tokenizer
    template: ChatTemplate | None  # of conversations
    fingerprint: str
    stats: dict[str, Any]
    directory: Path
    sources: tuple[
        tuple[str, StoredRows | Picked], ...
    ] = ()  # of a mixture: name and held-out rows of each


def prepare(cfg: DataConfig, context: int, *, progress: bool = True) -> PreparedData:
    """The packed rows of a corpus, prepared now or before.

    Args:
      cfg: source, tokenizer and held-out share. `cfg.seed` plays no part: shuffling is the
        loader's.
      context: tokens a row.
      progress: whether to show progress on stderr.

    Raises:
      DataError: anything wrong with the corpus, the tokenizer file or the cache; the message names
        it.
    """
    if cfg.mixture:
        return _mixed(cfg, context, progress)
    if context < 2:
        raise ConfigError(
            f"config.model.context = {context}: a row needs at least 2 tokens to predict one from another."
        )
    root, shared = cache_root(cfg), shared_root(cfg)
    memo = HashMemo(root / "hashes.json")
    source = open_source(cfg, memo)
    # A BPE is known by what it will be trained on; that is the rest of the fingerprint.
    tokenizer = None if cfg.tokenizer == "bpe" else build_tokenizer(cfg)
    spelling = tokenizer.fingerprint() if tokenizer else f"bpe {cfg.bpe_vocab}"
    corpus = source.fingerprint()
    how = (
        ()
        if cfg.format == "text"
        else (cfg.format, _template_source(cfg, tokenizer), *cfg.train_roles)
    )
    fingerprint = digest_of(
        str(FORMAT), corpus, spelling, str(context), repr(cfg.holdout), cfg.dedup, *how
    )
    final = root / fingerprint
    if not final.exists():
        try:
            wait = functools.partial(
                say,
                "another process is preparing the same data; waiting for it ...",
                shown=progress,
            )
            with exclusive(root / f"{fingerprint}.lock", wait):
                if not (
                    final.exists() or (shared and _fetch(shared / fingerprint, final, progress))
                ):
                    _write(final, source, corpus, tokenizer, cfg, context, progress)
                    if shared:
                        _publish(final, shared / fingerprint, progress)
        except OSError as e:
            raise DataError(
                f"{e.filename or root}: the prepared data cannot be written ({e.strerror or e}). "
                "Set config.data.cache_dir or $MOR_JAX_CACHE to a directory with enough space."
            ) from e
    return load_prepared(final)


def _mixed(cfg: DataConfig, context: int, progress: bool) -> PreparedData:
    """Each source prepared on its own; counts are sums, with those of each under "sources"."""
    names, weights = zip(*cfg.mixture, strict=True)
    each = [
        prepare(
            dataclasses.replace(cfg, mixture=(), paths=tuple(name.split(","))),
            context,
            progress=progress,
        )
        for name in names
    ]
    train, held_out = (Mixture([getattr(d, split) for d in each], weights) for split in SPLITS)

    def numbers(key: str) -> dict[str, int]:
        return {k: sum(d.stats[key][k] for d in each) for k in each[0].stats[key]}

    stats: dict[str, Any] = {split: numbers(split) for split in SPLITS}
    for key, value in each[0].stats.items():
        if isinstance(value, int):
            stats[key] = sum(d.stats[key] for d in each)
    notes = [
        f"{name}: {d.stats['note']}" for name, d in zip(names, each, strict=True) if d.stats["note"]
    ]
    stats |= {
        "note": " ".join(notes),
        "source": "mixture of " + ", ".join(d.stats["source"] for d in each),
    }
    stats["sources"] = {name: d.stats for name, d in zip(names, each, strict=True)}
    return dataclasses.replace(
        each[0],
        train=train,
        validation=Picked(held_out, held_out.fair()),
        fingerprint=digest_of("mixture", *(d.fingerprint for d in each), *map(repr, weights)),
        stats=stats,
        sources=tuple((name, d.validation) for name, d in zip(names, each, strict=True)),
    )


def cache_root(cfg: DataConfig) -> Path:
    """Where prepared data is read from: config.data.cache_dir, else $MOR_JAX_CACHE, else
    ~/.cache/mor_jax; then data/.

    Rows are read from this machine's files only. Where one of those is in an object store it is
    passed over here, and `shared_root` is where what is prepared goes to, and comes from on the
    next machine."""
    given = (cfg.cache_dir, os.environ.get("MOR_JAX_CACHE"), "~/.cache/mor_jax")
    root = next(place for place in given if place and is_local(place))
    return Path(root).expanduser().absolute() / "data"


def shared_root(cfg: DataConfig) -> epath.Path | None:
    """The directory of an object store that machines share prepared data through, if the
    configuration names one."""
    root = cfg.cache_dir or os.environ.get("MOR_JAX_CACHE") or ""
    return None if is_local(root) else as_path(root) / "data"


def _fetch(source: epath.Path, final: Path, shown: bool) -> bool:
    """Copy a complete cache entry of an object store here; False if there is none."""
    try:
        manifest = json.loads((source / MANIFEST).read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as e:
        raise DataError(
            f"{source / MANIFEST}: damaged data cache ({e!r}). Delete {source} and run again."
        ) from e
    work = final.with_name(f"{final.name}.fetched")
    shutil.rmtree(work, ignore_errors=True)
    with progress(
        f"fetching the prepared data from {source}", sum(manifest["files"].values()), shown=shown
    ) as advance:
        for name, size in manifest["files"].items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes((source / name).read_bytes())
            advance(size)
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2))
    os.rename(work, final)
    return True


def _publish(final: Path, target: epath.Path, shown: bool) -> None:
    """Copy a complete cache entry into an object store, its manifest last: without it there is
    none."""
    manifest = json.loads((final / MANIFEST).read_text())
    with progress(
        f"copying the prepared data to {target}", sum(manifest["files"].values()), shown=shown
    ) as advance:
        for name, size in manifest["files"].items():
            (target / name).write_bytes((final / name).read_bytes())
            advance(size)
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2))


def load_prepared(directory: Path) -> PreparedData:
    """Open a complete cache entry. Raises DataError naming the damaged file and what to do."""
    todo = f"Delete the directory {directory} and run again; it will be prepared anew."
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files, stats, fingerprint = manifest["files"], manifest["stats"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: damaged data cache ({e!r}). {todo}") from e
    for name, size in files.items():
        found = (directory / name).stat().st_size if (directory / name).exists() else None
        if found != size:
            is_now = "is missing" if found is None else f"has {found} bytes"
            raise DataError(
                f"{directory / name}: damaged data cache (the file {is_now}, was {size} bytes). {todo}"
            )
    return PreparedData(
        train=StoredRows(directory / "rows", "train"),
        validation=StoredRows(directory / "rows", "validation"),
        tokenizer=load_tokenizer(directory),
        template=find_template(directory) if (directory / TEMPLATE_FILE).exists() else None,
        fingerprint=fingerprint,
        stats=stats,
        directory=directory,
    )


def _write(
    final: Path,
    source: TextSource,
    corpus: str,
    tokenizer: Tokenizer | None,
    cfg: DataConfig,
    context: int,
    shown: bool,
) -> None:
    """Prepare into `final`, going on from whatever an earlier attempt finished."""
    work = final.with_name(f"{final.name}.work")
    plan, tokenizer = _plan(work, source, tokenizer, cfg, shown)
    chat = cfg.conversations
    template = build_template(cfg.chat_template, tokenizer, cfg.tokenizer) if chat else None
    encode = (
        _text_encoder(tokenizer)
        if template is None
        else _chat_encoder(tokenizer, template, cfg, context)
    )
    with progress(f"tokenizing {source.label}", plan.bytes, shown=shown) as advance:
        documents = plan.split(nonempty(source))
        parts = write_parts(documents, encode, tokenizer.vocab_size, work / "parts", advance)
    if source.fingerprint() != corpus:
        shutil.rmtree(work)
        raise DataError(
            f"{source.label}: the corpus changed while it was being prepared. Run again."
        )

    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    stats: dict[str, Any] = {**_count(parts, chat)}
    for split in SPLITS if chat else ():
        if not stats[split]["trained"]:
            shutil.rmtree(work)
            raise DataError(
                f"{source.label}: no conversation of the {split} split has a message of config.data.train_roles = "
                f"{cfg.train_roles} that fits a row of {context} tokens (of preferences, both together). Raise config.model.context, or check the roles."
            )
    total = sum(-(-stats[split]["tokens"] // context) for split in SPLITS)
    with progress("writing rows", total, "rows", shown=shown) as advance:

        def rows(held_out: bool) -> Iterator[Row]:
            documents = read_documents(parts, held_out)
            if chat:
                packed = pack_whole(documents, context, eos=tokenizer.eos)
            else:
                packed = pack(
                    (d.ids for d in documents),
                    context,
                    bos=tokenizer.bos if tokenizer.add_bos else None,
                    eos=tokenizer.eos,
                )
            for row in packed:
                yield row
                advance(1)

        of_split = {split: functools.partial(rows, held_out) for split, held_out in SPLITS.items()}
        written = write_rows(out / "tfds", of_split, context, weighted=chat)
    os.replace(written, out / "rows")
    shutil.rmtree(out / "tfds")
    for split in SPLITS:
        stats[split]["rows"] = len(StoredRows(out / "rows", split))
    tokenizer.save(out)
    if template is not None:
        template.save(out)
    stats |= {
        "note": plan.note,
        "source": source.label,
        "skipped_files": getattr(source, "skipped", 0),
    }
    stats |= {"duplicates": plan.duplicates, "crossing": plan.crossing, "dropped": plan.dropped}
    stats["skipped_records"] = getattr(source, "skipped_records", 0)
    if stats["skipped_records"]:
        say(
            f"{source.label}: {stats['skipped_records']:,} records without a text were skipped.",
            shown=shown,
        )
    files = {
        str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()
    }
    manifest = {"fingerprint": final.name, "context": context, "stats": stats, "files": files}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2))
    try:
        os.rename(out, final)
    except OSError:
        # else another process without our lock was faster; its result is the same
        if not final.exists():
            raise
    shutil.rmtree(work, ignore_errors=True)
    if plan.note:
        say(plan.note, shown=shown)


def _plan(
    work: Path, source: TextSource, tokenizer: Tokenizer | None, cfg: DataConfig, shown: bool
) -> tuple[HoldoutPlan, Tokenizer]:
    """The split and the tokenizer, from `work` where an earlier attempt left them."""
    path = work / "plan.json"
    try:
        return HoldoutPlan(**json.loads(path.read_text())), load_tokenizer(work)
    except (OSError, ValueError, TypeError, DataError):
        shutil.rmtree(work, ignore_errors=True)
    survey = HoldoutSurvey(cfg.holdout, cfg.dedup)
    sample = _Sample(BPE_SAMPLE_BYTES) if tokenizer is None else None
    with progress(f"reading {source.label}", None, shown=shown) as advance:
        for document in nonempty(source):
            survey(document)
            if sample:
                sample.add(document)
            advance(len(document.text))
    plan = survey.plan(source.label)
    if cfg.conversations and plan.documents == 1:
        raise DataError(
            f"{source.label}: one conversation cannot be split into training and held-out data; give more."
        )
    if sample:
        say(f"training a BPE of {cfg.bpe_vocab} tokens ...", shown=shown)
        texts = (d for d, held_out in plan.split(sample.documents()) if not held_out)
        tokenizer = build_tokenizer(cfg, map(_spoken, texts) if cfg.conversations else texts)
    assert tokenizer is not None, "given, or trained on the sample"
    tokenizer.save(work)
    # last: it says that the tokenizer is there
    path.write_text(json.dumps(dataclasses.asdict(plan)))
    return plan, tokenizer


class _Sample:
    """The documents with the highest places, up to a number of bytes: an even sample that any
    machine repeats.

    High places, since low ones are held out and must not shape the tokenizer."""

    def __init__(self, limit: int):
        self._limit, self._size = limit, 0
        self._heap: list[tuple[float, int, Document]] = []

    def add(self, document: Document) -> None:
        heapq.heappush(self._heap, (place(document.id), len(self._heap), document))
        self._size += len(document.text)
        while self._size > self._limit and len(self._heap) > 1:
            self._size -= len(heapq.heappop(self._heap)[2].text)

    def documents(self) -> Iterable[Document]:
        return [document for _, _, document in sorted(self._heap, key=lambda entry: entry[:2])]


def _template_source(cfg: DataConfig, tokenizer: Tokenizer | None) -> str:
    """The text of the template; a name where the tokenizer that goes with it is not trained yet."""
    if tokenizer is None and cfg.chat_template in ("", "plain", "chatml"):
        return cfg.chat_template
    return build_template(cfg.chat_template, tokenizer or ByteTokenizer(), cfg.tokenizer).source


def _text_encoder(tokenizer: Tokenizer) -> Encode:
    return lambda texts: [Encoded(ids) for ids in tokenizer.encode_arrays(texts)]


def _chat_encoder(
    tokenizer: Tokenizer, template: ChatTemplate, cfg: DataConfig, context: int
) -> Encode:
    nothing = Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32))

    def pairs(texts: list[str]) -> list[Encoded]:
        made = (
            template.pair(tokenizer, **json.loads(text), roles=cfg.train_roles, limit=context)
            for text in texts
        )
        return [nothing if two is None else _joined(*two) for two in made]

    def encode(texts: list[str]) -> list[Encoded]:
        made = (
            template.sample(tokenizer, json.loads(text), cfg.train_roles, context) for text in texts
        )
        return [
            nothing if sample is None else Encoded(sample.ids, sample.weights) for sample in made
        ]

    return pairs if cfg.format == "preference" else encode


def _joined(one: Sample, other: Sample) -> Encoded:
    """Two conversations as one document."""
    ids, weights = (np.concatenate(arrays) for arrays in zip(one, other, strict=True))
    return Encoded(ids, weights, len(one.ids))


def _spoken(document: Document) -> Document:
    """What is said in a conversation, as text to train a tokenizer on."""
    said = json.loads(document.text)
    messages = said if isinstance(said, list) else [*said["chosen"], *said["rejected"]]
    return Document(document.id, "\n\n".join(m["content"] for m in messages))


def _count(parts: list[Path], chat: bool) -> dict[str, dict[str, int]]:
    stats = {split: {"documents": 0, "tokens": 0, "bytes": 0, "rows": 0} for split in SPLITS}
    for path in parts:
        part = read_part(path)
        for split, held_out in SPLITS.items():
            mine = part.held_out == held_out
            stats[split]["documents"] += int(mine.sum())
            ends = 0 if chat else 2 * int(mine.sum())  # the begin and end of each document
            stats[split]["tokens"] += int(part.lengths[mine].sum()) + ends
            stats[split]["bytes"] += int(part.sizes[mine].sum())
            if chat:
                trained = np.repeat(mine, part.lengths) & (part.weights != 0)
                stats[split]["trained"] = stats[split].get("trained", 0) + int(trained.sum())
                skipped = int((part.lengths[mine] == 0).sum())
                stats[split]["skipped"] = stats[split].get("skipped", 0) + skipped
    return stats


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; calls `on_wait` once if another process has it.

    The kernel releases the lock when its process ends, however it ends; the file itself stays,
    since removing it would let two processes lock two different files of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        if fcntl is not None:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(f, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks, as above
        yield
