"""Every source and compression gives its documents; every way to fail names the file and the way
out."""

import builtins
import gzip
import json
import lzma
import sys

import numpy as np
import pytest

from mor_jax.config import DataConfig
from mor_jax.data.sources import open_source
from mor_jax.errors import DataError

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TEXTS = ["first text", "zweiter Text: äöü", "三"]
compressions = pytest.mark.parametrize("compression", COMPRESS, ids=lambda c: c or "plain")


def files(*paths, **kw):
    return open_source(DataConfig(source="files", paths=tuple(map(str, paths)), **kw))


def read(source):
    return [tuple(d) for d in source.documents()]


def message(call, *args, **kw) -> str:
    with pytest.raises(DataError) as e:
        result = call(*args, **kw)
        list(result.documents() if hasattr(result, "documents") else result)
    return str(e.value)


def jsonl(texts=TEXTS, key="text") -> bytes:
    return b"".join(json.dumps({"n": i, key: t}).encode() + b"\n" for i, t in enumerate(texts))


# -- files -----------------------------------------------------------------------------------------


@compressions
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_text_files_are_one_document_each(tmp_path, suffix, compression):
    for name in ("b/two", "a"):
        path = tmp_path / f"{name}{suffix}{compression}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(COMPRESS[compression](f"\ufeffI am {name}\r\n".encode()))
    found = read(files(tmp_path / "**" / f"*{suffix}{compression}"))
    assert found == [(f"{n}{suffix}{compression}", f"I am {n}\r\n") for n in ("a", "b/two")]


@compressions
def test_jsonl(tmp_path, compression):
    path = tmp_path / f"x.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](jsonl(key="body").replace(b"\n", b"\n\n", 1)))
    found = read(files(path, text_key="body"))
    assert [t for _, t in found] == TEXTS
    assert [i for i, _ in found] == [f"{path.name}:{n}" for n in (1, 3, 4)]  # line 2 is blank


@compressions
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()], ids=str)
def test_parquet(tmp_path, compression, kind):
    plain = tmp_path / "x"
    table = pyarrow.table({"n": [1, 2, 3], "text": pyarrow.array(TEXTS, kind)})
    parquet.write_table(table, plain, row_group_size=2)
    path = tmp_path / f"x.parquet{compression}"
    path.write_bytes(COMPRESS[compression](plain.read_bytes()))
    assert read(files(path)) == [(f"{path.name}:{n}", t) for n, t in enumerate(TEXTS, 1)]


def test_zst_of_several_frames(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    lines = jsonl().splitlines(keepends=True)
    path.write_bytes(b"".join(map(zstandard.compress, lines)))
    assert [t for _, t in read(files(path))] == TEXTS


def test_documents_can_be_read_again_and_overlapping_globs_count_once(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl())
    source = files(tmp_path / "*.jsonl", tmp_path / "x*")
    assert read(source) == read(source) and len(read(source)) == 3


def test_brackets_in_names_are_not_wildcards(tmp_path, monkeypatch):
    (tmp_path / "[ab]").mkdir()
    (tmp_path / "[ab]" / "x[1].txt").write_text("found")
    assert [t for _, t in read(files(tmp_path / "[ab]" / "x[1].txt"))] == ["found"]
    monkeypatch.chdir(tmp_path / "[ab]")
    assert (
        [t for _, t in read(files("*.txt"))]
        == [t for _, t in read(files("./x[1].txt"))]
        == ["found"]
    )


def test_ids_stay_when_files_are_added_or_the_corpus_moves(tmp_path):
    for root in ("here", "there"):
        (tmp_path / root / "sub").mkdir(parents=True)
        (tmp_path / root / "sub" / "x.txt").write_text("x")
    (tmp_path / "there" / "a.txt").write_text("more")
    here, there = (
        dict(read(files(tmp_path / root / "**" / "*.txt"))) for root in ("here", "there")
    )
    assert here == {"sub/x.txt": "x"} and there == {"sub/x.txt": "x", "a.txt": "more"}


def test_fingerprint_follows_content_name_and_key_only(tmp_path):
    def fingerprint(root, name="x.jsonl", content=b'{"text": "a", "b": "c"}\n', key="text"):
        (tmp_path / root).mkdir()
        (tmp_path / root / name).write_bytes(content)
        return files(tmp_path / root / "*", text_key=key).fingerprint()

    base = fingerprint("1")
    assert fingerprint("2") == base
    assert (
        len(
            {
                base,
                fingerprint("3", name="y.jsonl"),
                fingerprint("4", content=b"{}"),
                fingerprint("5", key="b"),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "cut', ["line 2", "not valid JSON", "one JSON object a line"]),
        (b"[1, 2]", ["line 2", "expected a JSON object", "[1, 2]"]),
        (b'{"body": "x", "n": 1}', ["line 2", "'text'", "'body', 'n'", "config.data.text_key"]),
        (b'{"text": 5}', ["line 2", "must be text", "5"]),
        (b'{"text": null}', ["line 2", "must be text", "None"]),
        (b'{"text": "\xff"}', ["line 2", "not UTF-8", "iconv"]),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, says):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    said = message(files, path)
    assert str(path) in said
    assert all(s in said for s in says), said


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compressed_files_are_named(tmp_path, compression, damage):
    path = tmp_path / f"x.jsonl{compression}"
    noise = np.random.default_rng(0).integers(0, 10, 50_000)
    whole = COMPRESS[compression](jsonl([str(noise.tolist())]))
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"garbage" + whole)
    said = message(files, path)
    assert str(path) in said and compression[1:] in said and "fetch it again" in said


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("naïve".encode("latin1"))
    said = message(files, path)
    assert str(path) in said and "0xef at offset 2" in said and "iconv" in said


def test_a_forbidden_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("x")

    def forbid(name, *args, **kw):
        raise PermissionError(13, "Permission denied", str(name))

    source = files(path)
    monkeypatch.setattr(builtins, "open", forbid)  # file modes do not stop a superuser
    said = message(source.documents)
    assert str(path) in said and "ermission" in said


def test_a_glob_without_files_is_named(tmp_path):
    said = message(files, tmp_path / "*.jsonl")
    assert str(tmp_path / "*.jsonl") in said and "matches no file" in said
    assert "It is a directory" in message(files, tmp_path)


def test_an_unknown_suffix_is_named_with_the_known_ones(tmp_path):
    path = tmp_path / "x.csv.gz"
    path.write_text("")
    said = message(files, path)
    assert str(path) in said and ".csv" in said
    assert all(
        s in said for s in (".txt", ".md", ".py", ".jsonl", ".parquet", ".gz", ".xz", ".zst")
    )


@pytest.mark.parametrize(
    ("name", "package"), [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow")]
)
def test_an_optional_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    path = tmp_path / name
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    said = message(files, path)
    assert str(path) in said and package in said and f"pip install {package}" in said


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    said = message(files, path)
    assert str(path) in said and "'body', 'n'" in said and "config.data.text_key" in said
    parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    assert f"{path}, row 2" in message(files, path)
    path.write_bytes(path.read_bytes()[:-20])
    said = message(files, path)
    assert str(path) in said and "parquet" in said


# -- pystdlib --------------------------------------------------------------------------------------


def test_pystdlib_is_sorted_and_leaves_tests_and_packages_out():
    source = open_source(DataConfig())
    ids = [d.id for d in source.documents()]
    assert ids == sorted(ids) and "json/decoder.py" in ids and len(ids) > 300
    banned = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not any(banned & set(i.split("/")) for i in ids)
    assert source.fingerprint() == open_source(DataConfig()).fingerprint()


def test_pystdlib_skips_and_counts_what_cannot_be_decoded(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_bytes(b"# coding: latin1\nx = '\xe9'\n")
    (tmp_path / "bad.py").write_bytes(b"x = '\xe9'\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    source = open_source(DataConfig())
    assert read(source) == [("good.py", "# coding: latin1\nx = 'é'\n")]
    assert source.skipped == 1


# -- tfds ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_home(tmp_path_factory):
    """A text data set that TFDS has prepared, as a user would have made it."""
    import tensorflow_datasets as tfds

    class LittleProse(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n, text in enumerate(TEXTS * 30):
                yield n, {"text": text, "n": n}

    home = tmp_path_factory.mktemp("tfds")
    tfds.display_progress_bar(False)
    LittleProse(data_dir=str(home), file_format="array_record").download_and_prepare()
    return home


def tfds_source(directory, **kw):
    return open_source(DataConfig(source="tfds", paths=(str(directory),), **kw))


def test_tfds_by_directory_and_by_name(tfds_home):
    source = tfds_source(tfds_home / "little_prose" / "1.0.0")
    found = read(source)
    assert sorted(t for _, t in found) == sorted(TEXTS * 30) and len({i for i, _ in found}) == 90
    by_name = tfds_source(tfds_home, name="little_prose")
    assert read(by_name) == found and by_name.fingerprint() == source.fingerprint()
    part = tfds_source(tfds_home / "little_prose" / "1.0.0", split="train[:50%]")
    assert len(read(part)) == 45 and part.fingerprint() != source.fingerprint()


def test_tfds_messages(tfds_home, tmp_path):
    good = tfds_home / "little_prose" / "1.0.0"
    said = message(tfds_source, good, split="test")
    assert "config.data.split" in said and "train" in said
    said = message(tfds_source, good, text_key="body")
    assert "'body'" in said and "'text'" in said and "config.data.text_key" in said
    said = message(tfds_source, tmp_path)
    assert str(tmp_path) in said and "dataset_info.json" in said
    said = message(tfds_source, tmp_path, name="no_such_data_set")
    assert "no_such_data_set" in said and len(said) < 500
    said = message(tfds_source, tmp_path, name="lm1b")
    assert "not prepared" in said and "tfds build lm1b --file_format=array_record" in said


def test_tfds_prepared_as_tfrecord_says_how_to_prepare_again(tfds_home, tmp_path):
    for path in (tfds_home / "little_prose" / "1.0.0").iterdir():
        content = path.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        (tmp_path / path.name.replace("array_record", "tfrecord")).write_bytes(content)
    said = message(tfds_source, tmp_path)
    assert "tfrecord" in said and "--file_format=array_record" in said


def test_tfds_damaged_shard(tfds_home, tmp_path):
    for path in (tfds_home / "little_prose" / "1.0.0").iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content if path.suffix == ".json" else content[:-1000])
    assert "little_prose" in message(tfds_source, tmp_path)


def test_no_source_reaches_for_tensorflow():
    assert "tensorflow" not in sys.modules


BAD_LINES = {
    "null": b'{"text": null}',
    "no field": b'{"other": 1}',
    "a number": b'{"text": 3}',
    "a list": b"[1]",
    "cut off": b'{"text": "a',
    "latin-1": b'{"text": "\xe9"}',
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_records_stop_the_reading_or_are_skipped_with_a_count(tmp_path, name):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + BAD_LINES[name] + b'\n\n{"text": "two"}\n')
    said = message(lambda: read(files(path)))
    assert f"{path}, line 2" in said and "--config.data.bad_records=skip" in said
    source = files(path, bad_records="skip")
    for _ in range(2):  # each reading counts anew
        assert [(d.id, d.text) for d in source.documents()] == [
            ("a.jsonl:1", "one"),
            ("a.jsonl:4", "two"),
        ]
        assert source.skipped_records == 1


def test_null_rows_of_parquet_are_skipped_with_a_count(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    source = files(tmp_path / "a.parquet", bad_records="skip")
    assert [d.text for d in source.documents()] == ["one", "two"] and source.skipped_records == 1
    assert "row 2" in message(lambda: read(files(tmp_path / "a.parquet")))
