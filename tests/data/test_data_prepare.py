"""Prepared once, split by document, resumable, never stale, never half-read."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mor_jax.config import DataConfig
from mor_jax.data import packing
from mor_jax.data import prepare as prepare_module
from mor_jax.data.documents import HashMemo
from mor_jax.data.files import Files
from mor_jax.data.holdout import HoldoutPlan
from mor_jax.data.prepare import cache_root, load_prepared, prepare
from mor_jax.data.tokenizer import ByteTokenizer, train_bpe
from mor_jax.errors import ConfigError, DataError

CONTEXT = 32


def words(n: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list("abcde"), 4)) for _ in range(n))


@pytest.fixture
def corpus(tmp_path):
    """60 documents, each beginning with its own number."""
    path = tmp_path / "corpus" / "x.jsonl"
    path.parent.mkdir()
    path.write_text(
        "".join(json.dumps({"text": f"<{i}> {words(30, i)}"}) + "\n" for i in range(60))
    )
    return path


@pytest.fixture
def cfg(corpus, tmp_path):
    return DataConfig(
        source="files", paths=(str(corpus),), holdout=0.2, cache_dir=str(tmp_path / "cache")
    )


def go(cfg, context=CONTEXT, **change):
    return prepare(dataclasses.replace(cfg, **change), context, progress=False)


def texts(rows, tokenizer) -> list[str]:
    """The documents in the rows, put together again."""
    tokens = np.concatenate(
        [rows[i]["tokens"][rows[i]["segment_ids"] > 0] for i in range(len(rows))]
    )
    starts = np.flatnonzero(tokens == tokenizer.bos)
    return [tokenizer.decode(d) for d in np.split(tokens, starts)[1:]]


def source_texts(corpus) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def entries(cfg) -> list[str]:
    root = cache_root(cfg)
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.exists() else []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_rows_hold_the_corpus_split_by_document(cfg, corpus, tokenizer):
    data = go(cfg, tokenizer=tokenizer, bpe_vocab=300)
    train, held = (texts(rows, data.tokenizer) for rows in (data.train, data.validation))
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(source_texts(corpus))
    order = {t: i for i, t in enumerate(source_texts(corpus))}
    assert [order[t] for t in train] == sorted(order[t] for t in train)
    assert 3 <= len(held) <= 24
    for name, rows, found in (("train", data.train, train), ("validation", data.validation, held)):
        real = sum(int((rows[i]["segment_ids"] > 0).sum()) for i in range(len(rows)))
        assert data.stats[name] == {
            "documents": len(found),
            "tokens": real,
            "bytes": sum(len(t.encode()) for t in found),
            "rows": len(rows),
        }
        row = rows[len(rows) - 1]
        assert {k: (v.dtype, v.shape) for k, v in row.items()} == dict.fromkeys(
            row, (np.int32, (CONTEXT,))
        )
    assert data.stats["note"] == ""
    assert entries(cfg) == [data.fingerprint]  # nothing unfinished is left behind


def test_rows_behave_like_a_sequence(cfg):
    rows = go(cfg).train
    some = rows.read([3, 0, 3])
    assert all((some[i]["tokens"] == rows[j]["tokens"]).all() for i, j in enumerate([3, 0, 3]))
    assert (rows[-1]["tokens"] == rows[len(rows) - 1]["tokens"]).all()
    assert rows.context == CONTEXT and len(list(rows)) == len(rows)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_split_of_a_document_does_not_depend_on_the_others(cfg, corpus):
    held = set(texts(go(cfg).validation, ByteTokenizer()))
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:40]))
    assert set(texts(go(cfg).validation, ByteTokenizer())) == held & set(source_texts(corpus))


def test_bpe_is_trained_on_training_documents_only(cfg, corpus):
    data = go(cfg, tokenizer="bpe", bpe_vocab=300)
    train = texts(data.train, data.tokenizer)
    held = texts(data.validation, data.tokenizer)
    assert train_bpe(train, 300).fingerprint() == data.tokenizer.fingerprint()
    assert train_bpe(train + held * 9, 300).fingerprint() != data.tokenizer.fingerprint()


def test_a_large_corpus_is_sampled_for_the_bpe(cfg, monkeypatch):
    monkeypatch.setattr(prepare_module, "BPE_SAMPLE_BYTES", 2000)
    seen = []
    build = prepare_module.build_tokenizer

    def spy(cfg, documents=()):
        seen.extend(documents)
        return build(cfg, seen)

    monkeypatch.setattr(prepare_module, "build_tokenizer", spy)
    go(cfg, tokenizer="bpe", bpe_vocab=300)
    assert 1000 < sum(len(d.text) for d in seen) <= 2000


# -- few documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_each_side_gets_a_document(cfg, holdout):
    data = go(cfg, holdout=holdout)
    few = "validation" if holdout < 0.5 else "train"
    assert data.stats[few]["documents"] == 1
    assert data.stats["train"]["documents"] + data.stats["validation"]["documents"] == 60
    assert "few documents" in data.stats["note"]


def test_the_tail_of_a_single_document_is_held_out(cfg, tmp_path):
    text = words(200, 0)
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "none.txt").write_text("")
    data = go(cfg, paths=(str(tmp_path / "*.txt"),), holdout=0.25)
    (train,), (held,) = (texts(rows, data.tokenizer) for rows in (data.train, data.validation))
    assert train + held == text and len(held) == pytest.approx(len(text) / 4, abs=1)
    assert "one document" in data.stats["note"]


def test_two_characters_are_enough_and_one_is_not(cfg, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("é!")
    data = go(cfg, paths=(str(path),), holdout=0.001)
    assert (texts(data.train, data.tokenizer), texts(data.validation, data.tokenizer)) == (
        ["é"],
        ["!"],
    )
    path.write_text("x")
    with pytest.raises(DataError, match="single character"):
        go(cfg, paths=(str(path),))


@pytest.mark.parametrize("content", ["", '{"text": ""}\n\n{"text": ""}\n'])
def test_an_empty_corpus_is_an_error(cfg, corpus, content):
    corpus.write_text(content)
    with pytest.raises(DataError, match="corpus is empty") as e:
        go(cfg)
    assert str(corpus) in str(e.value)


# -- texts that repeat -----------------------------------------------------------------------------


def write_texts(corpus, repeated):
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in repeated))


def test_no_held_out_text_is_trained_on(cfg, corpus):
    once = source_texts(corpus)
    write_texts(corpus, once * 4)  # copies fall on both sides of the split
    data = go(cfg)
    train, held = (texts(rows, data.tokenizer) for rows in (data.train, data.validation))
    assert held and not set(train) & set(held) and set(train) | set(held) == set(once)
    assert data.stats["duplicates"] == 180
    assert data.stats["crossing"] == data.stats["dropped"] == 240 - len(train) - len(held) > 0
    assert "180 of 240 documents repeat" in data.stats["note"]
    both = go(cfg, dedup="none")
    train, held = (texts(rows, both.tokenizer) for rows in (both.train, both.validation))
    assert len(train) + len(held) == 240 and len(set(train) & set(held)) > 0
    assert sum(text in set(held) for text in train) == both.stats["crossing"]
    assert both.stats["dropped"] == 0


def test_dedup_all_keeps_one_copy_of_each_text(cfg, corpus):
    once = source_texts(corpus)
    write_texts(corpus, once + once[::-1] + once[:7])
    data = go(cfg, dedup="all")
    train, held = (texts(rows, data.tokenizer) for rows in (data.train, data.validation))
    assert sorted(train + held) == sorted(once) and data.stats["dropped"] == 67
    assert set(held) == set(texts(go(cfg).validation, data.tokenizer))


def test_a_corpus_without_repetition_is_split_as_it_was(cfg):
    kinds = [go(cfg, dedup=dedup) for dedup in ("none", "holdout", "all")]
    first, *others = (texts(data.train, data.tokenizer) for data in kinds)
    assert all(train == first for train in others) and all(
        "repeat" not in k.stats["note"] for k in kinds
    )


def test_copies_of_one_text_cannot_be_split(cfg, corpus):
    write_texts(corpus, ["the same words"] * 40)
    with pytest.raises(
        DataError, match=r"every training document is a copy .*1 different texts in 40"
    ):
        go(cfg)
    assert go(cfg, dedup="none").stats["crossing"] > 0


# -- the cache -------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_what_changes_the_rows(cfg, corpus, tmp_path):
    bpe = train_bpe(source_texts(corpus), 280).save(tmp_path / "t")
    changes = [
        {},
        {"context": 33},
        {"holdout": 0.3},
        {"dedup": "all"},
        {"tokenizer": "bpe", "bpe_vocab": 300},
        {"tokenizer": "bpe", "bpe_vocab": 310},
        {"tokenizer": str(bpe)},
    ]
    found = [go(cfg, **change).fingerprint for change in changes]
    assert len(set(found)) == len(found)
    assert go(cfg).fingerprint == go(cfg, seed=5, bpe_vocab=999).fingerprint == found[0]
    text = corpus.read_text()
    corpus.write_text(text.replace("<7>", "<8>"))  # same size
    assert go(cfg).fingerprint not in found
    corpus.write_text(text)
    assert go(cfg).fingerprint == found[0]


def test_a_hit_reads_and_tokenizes_nothing(cfg, monkeypatch):
    first = go(cfg, tokenizer="bpe", bpe_vocab=300)

    def never(*args, **kw):
        raise AssertionError("read again")

    monkeypatch.setattr(Files, "documents", never)
    monkeypatch.setattr(prepare_module, "write_parts", never)
    monkeypatch.setattr(prepare_module, "build_tokenizer", never)
    again = go(cfg, tokenizer="bpe", bpe_vocab=300)
    assert again.fingerprint == first.fingerprint and again.stats == first.stats
    assert (again.train[1]["tokens"] == first.train[1]["tokens"]).all()


def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "big.txt"
    path.write_bytes(b"x" * (2 << 20))
    os.utime(path, (1e9, 1e9))
    memo = HashMemo(tmp_path / "cache" / "hashes.json")
    first = memo(str(path))
    monkeypatch.setattr("mor_jax.data.documents.hash_file", lambda p: "hashed again")
    assert HashMemo(tmp_path / "cache" / "hashes.json")(str(path)) == first
    os.utime(path, (2e9, 2e9))
    assert memo(str(path)) == "hashed again"
    # Just written: it could change once more within the resolution of its times, so it is not
    # remembered.
    os.utime(path)
    memo(str(path))
    monkeypatch.undo()
    assert memo(str(path)) == first


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MOR_JAX_CACHE", str(tmp_path / "env"))
    assert cache_root(DataConfig()) == tmp_path / "env" / "data"
    assert cache_root(DataConfig(cache_dir=str(tmp_path / "own"))) == tmp_path / "own" / "data"
    monkeypatch.delenv("MOR_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(DataConfig()) == tmp_path / ".cache" / "mor_jax" / "data"


# -- interruptions ---------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def count_encodes(monkeypatch, tokenizer_class, die_at=None) -> list[str]:
    seen: list[str] = []
    encode = tokenizer_class.encode_arrays

    def spy(self, texts):
        if die_at is not None and len(seen) >= die_at:
            raise Killed
        seen.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(tokenizer_class, "encode_arrays", spy)
    return seen


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_killed_preparation_goes_on_from_its_parts(cfg, corpus, tmp_path, monkeypatch, tokenizer):
    from mor_jax.data.bpe import BpeTokenizer

    kind = {"bytes": ByteTokenizer, "bpe": BpeTokenizer}[tokenizer]
    cfg = dataclasses.replace(cfg, tokenizer=tokenizer, bpe_vocab=300)
    monkeypatch.setattr(packing, "PART_BYTES", 1000)
    whole = go(cfg, cache_dir=str(tmp_path / "uninterrupted"))

    with monkeypatch.context() as patch:
        before = count_encodes(patch, kind, die_at=30)
        with pytest.raises(Killed):
            go(cfg)
    assert len(before) >= 30 and len(entries(cfg)) == 1 and entries(cfg)[0].endswith(".work")

    with monkeypatch.context() as patch:
        after = count_encodes(patch, kind)
        patch.setattr("mor_jax.data.tokenizer.train_bpe", lambda *a: pytest.fail("trained again"))
        data = go(cfg)
    assert before + after == source_texts(corpus)  # each document was tokenised exactly once
    assert data.fingerprint == whole.fingerprint and data.stats == whole.stats
    for ours, theirs in ((data.train, whole.train), (data.validation, whole.validation)):
        for a, b in zip(ours, theirs, strict=True):
            assert all((a[k] == b[k]).all() for k in a)
    assert entries(cfg) == [data.fingerprint]


def test_a_kill_while_rows_are_written_or_a_damaged_part_costs_only_that(cfg, corpus, monkeypatch):
    monkeypatch.setattr(packing, "PART_BYTES", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "pack", lambda *a, **kw: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            go(cfg)
    (work,) = (cache_root(cfg) / name for name in entries(cfg))
    written = sorted((work / "parts").iterdir())
    written[-1].write_bytes(written[-1].read_bytes()[:100])  # as a power cut might
    seen = count_encodes(monkeypatch, ByteTokenizer)
    data = go(cfg)
    assert 0 < len(seen) < 10
    assert data.stats["train"]["documents"] + data.stats["validation"]["documents"] == 60


def test_a_corpus_that_changes_meanwhile_is_refused(cfg, corpus, monkeypatch):
    split = HoldoutPlan.split

    def meddle(self, documents):
        yield from split(self, documents)
        corpus.write_text(corpus.read_text() + '{"text": "late"}\n')

    with monkeypatch.context() as patch:
        patch.setattr(HoldoutPlan, "split", meddle)
        with pytest.raises(DataError, match="changed while it was being prepared"):
            go(cfg)
    assert entries(cfg) == []
    assert go(cfg).stats["train"]["documents"] + go(cfg).stats["validation"]["documents"] == 61


def test_two_processes_at_once_prepare_one_whole_cache(cfg):
    code = (
        "from mor_jax.config import DataConfig; from mor_jax.data.prepare import prepare;"
        f"d = prepare({cfg!r}, {CONTEXT}); print(d.fingerprint, len(d.train), d.train[0]['tokens'].sum())"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    out = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert out[0][0] == out[1][0] and out[0][0].strip()
    assert len(entries(cfg)) == 1 and not entries(cfg)[0].endswith(".work")


def test_losing_the_race_without_locks_uses_the_winner(cfg, monkeypatch):
    winner = []
    save = ByteTokenizer.save

    def late(self, directory):
        if directory.name == "out" and not winner:
            winner.append(None)
            os.rename(cache_root(cfg) / work(), cache_root(cfg) / "aside")
            winner[0] = go(cfg, cache_dir=cfg.cache_dir + "2").directory
            os.rename(cache_root(cfg) / "aside", cache_root(cfg) / f"{winner[0].name}.work")
            os.rename(winner[0], cache_root(cfg) / winner[0].name)
        return save(self, directory)

    def work():
        return next(name for name in entries(cfg) if name.endswith(".work"))

    monkeypatch.setattr(ByteTokenizer, "save", late)
    data = go(cfg)
    assert winner and entries(cfg) == [data.fingerprint]


# -- messages --------------------------------------------------------------------------------------


def damage_message(directory, call) -> str:
    with pytest.raises(DataError) as e:
        call()
    said = str(e.value)
    assert f"Delete the directory {directory}" in said and "run again" in said
    return said


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_truncated_cache_is_named(cfg, split):
    directory = go(cfg).directory
    (path,) = directory.glob(f"rows/*{split}*")
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in damage_message(directory, lambda: go(cfg))
    path.unlink()
    assert "missing" in damage_message(directory, lambda: go(cfg))


def test_a_corrupted_record_is_named_when_it_is_read(cfg):
    data = go(cfg)
    (path,) = data.directory.glob("rows/*train*")
    content = bytearray(path.read_bytes())
    content[65600:66600] = bytes(1000)  # same size; within the records, which begin at 64 KiB
    path.write_bytes(content)
    rows = go(cfg).train
    said = damage_message(data.directory, lambda: rows.read(range(len(rows))))
    assert f"{path}, record " in said and f"of {len(rows)}): damaged" in said


@pytest.mark.parametrize("name", ["prepared.json", "tokenizer.json", "rows/dataset_info.json"])
def test_damaged_metadata_is_named(cfg, name):
    directory = go(cfg).directory
    path = directory / name
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DataError) as e:
        load_prepared(directory)
    assert str(path) in str(e.value) or str(path.parent) in str(e.value)
    assert name == "tokenizer.json" or f"Delete the directory {directory}" in str(e.value)


def test_a_cache_directory_that_cannot_be_written_is_named(cfg, corpus):
    with pytest.raises(DataError) as e:
        go(cfg, cache_dir=str(corpus))  # a file
    assert str(corpus) in str(e.value) and "config.data.cache_dir" in str(e.value)


def test_a_context_of_one_token_is_refused(cfg):
    with pytest.raises(ConfigError, match=r"config\.model\.context"):
        go(cfg, context=1)


def test_progress_goes_to_stderr_and_only_when_wanted(cfg, capfd):
    go(cfg)
    assert capfd.readouterr() == ("", "")
    prepare(dataclasses.replace(cfg, tokenizer="bpe", bpe_vocab=300), CONTEXT)
    out, err = capfd.readouterr()
    assert out == "" and "tokenizing files" in err and "training a BPE" in err


def test_tensorflow_was_never_imported():
    assert "tensorflow" not in sys.modules
