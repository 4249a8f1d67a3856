"""Tokenizers: nothing is lost, bytes are counted exactly, streams equal whole decodes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mor_jax.config import DataConfig
from mor_jax.data import bpe
from mor_jax.data.documents import Document
from mor_jax.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    build_tokenizer,
    load_tokenizer,
    train_bpe,
)
from mor_jax.errors import DataError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox, naïve and café-bound, jumps over 1234 lazy dogs.",
    "日本語のテキスト и немного кириллицы 🎉🎉",
] * 4
BPE = train_bpe(TEXTS, 400)
BYTES = ByteTokenizer()
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@both
@settings(max_examples=150, deadline=None)
@given(text=unicode_text)
def test_any_text_survives_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos, tokenizer.eos} & set(ids)


@both
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_equals_decode_for_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5)))
    stream = tokenizer.stream()
    pushed = "".join(stream.push(i) for i in ids)
    text = pushed + stream.flush()
    assert text == tokenizer.decode(ids)
    raw = b"".join(tokenizer.piece(i) for i in ids)
    assert text == raw.decode("utf-8", "replace")


LONG_WORDS = {
    "base64": lambda rng: rng.choice(
        list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"), 1 << 20
    ),
    "DNA": lambda rng: rng.choice(list("ACGT"), 1 << 20),
    "digits": lambda rng: rng.choice(list("0123456789"), 1 << 20),
    "spaces": lambda rng: [" "] * (1 << 20),
    "punctuation": lambda rng: rng.choice(list("[]{}:,"), 1 << 20),
    "Chinese": lambda rng: [chr(0x4E00 + i) for i in rng.integers(0, 900, 1 << 19)],
}


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_one_unbroken_word_of_a_megabyte_is_learned_from_in_pieces(kind):
    """The library's trainer would take time quadratic in its length: hours for this one."""
    word = "".join(LONG_WORDS[kind](np.random.default_rng(0)))
    tokenizer = train_bpe([word], 700)
    assert max(len(tokenizer.piece(i)) for i in range(tokenizer.vocab_size)) <= bpe.LONGEST_WORD
    assert tokenizer.decode(tokenizer.encode(word)) == word


def test_words_of_ordinary_length_are_learned_from_whole():
    names = [f"a_{'long' * 20}_{i}" for i in range(40)]
    whole = tokenizers.Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[bpe.BOS, bpe.EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    whole.train_from_iterator(TEXTS + names, trainer)
    assert train_bpe(TEXTS + names, 400).to_json() == BpeTokenizer(whole).to_json().replace(
        '"decoder":null',
        '"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}',
    )


def test_a_stream_holds_back_half_a_character():
    stream = BYTES.stream()
    euro = "€".encode()
    assert [stream.push(b) for b in euro] == ["", "", "€"]
    assert stream.push(euro[0]) == "" and stream.flush() == "�"


@both
def test_batches_equal_single_encodes(tokenizer):
    single = [tokenizer.encode(text) for text in ["", *TEXTS]]
    assert tokenizer.encode_batch(["", *TEXTS]) == single
    arrays = tokenizer.encode_arrays(["", *TEXTS])
    assert all(a.dtype == np.int32 for a in arrays)
    assert [a.tolist() for a in arrays] == single


@both
def test_special_tokens_stand_for_nothing(tokenizer):
    assert tokenizer.token_bytes.dtype == np.int32 and tokenizer.token_bytes.shape == (
        tokenizer.vocab_size,
    )
    assert tokenizer.token_bytes[[tokenizer.bos, tokenizer.eos]].tolist() == [0, 0]
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("x"), tokenizer.eos]) == "x"
    assert tokenizer.token_text(tokenizer.eos) == "<|eos|>"
    # Spelled out in a document they are ordinary text.
    for text in ("a<|eos|>b", "é<|eos|>b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b🎉")) == "a�b🎉"


@both
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "new")
    assert path.name == "tokenizer.json"
    for where in (path, path.parent):
        again = load_tokenizer(where)
        assert type(again) is type(tokenizer)
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert (again.vocab_size, again.bos, again.eos) == (
            tokenizer.vocab_size,
            tokenizer.bos,
            tokenizer.eos,
        )


def test_fingerprints_differ_between_tokenizers():
    assert len({BYTES.fingerprint(), BPE.fingerprint(), train_bpe(TEXTS, 300).fingerprint()}) == 3


def test_training_is_deterministic_across_processes():
    code = f"from mor_jax.data.tokenizer import train_bpe; print(train_bpe({TEXTS!r}, 400).fingerprint())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == BPE.fingerprint()
    assert BPE.vocab_size <= 400 and BPE.bos == 0 and BPE.eos == 1


def library(text: str) -> list[int]:
    """The oracle of what follows."""
    return BPE._hf.encode(text, add_special_tokens=False).ids


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(st.characters(max_codepoint=127))
    | st.text(st.sampled_from("aB1 \n\t'.s_-é"), max_size=60)
)
def test_encoding_by_remembered_words_equals_the_library(text):
    assert BPE.encode(text) == library(text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("ab é.\n '1日"), min_size=20, max_size=400))
def test_long_texts_cut_in_pieces_give_the_same_tokens(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BPE, "_piece", 8)
        patch.setattr(bpe, "GROUP", 20)
        assert "".join(bpe.cut_text(text, 8)) == text
        assert BPE.encode(text) == library(text)


def test_remembered_words_are_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "LIMIT", 50)
    fresh = BpeTokenizer(tokenizers.Tokenizer.from_str(BPE.to_json()))
    for n in range(200):
        assert fresh.encode(f"number {n} of x{n}") == library(f"number {n} of x{n}")
        assert len(fresh._words._known) < 60


def test_only_gpt2_words_are_remembered():
    assert BPE._words is not None
    assert BpeTokenizer(_sentencepiece_like())._words is None
    assert BpeTokenizer(_byte_level(["<s>"], extra=["    "]))._words is None
    other = _byte_level(["<s>"])
    other.normalizer = normalizers.NFC()
    assert BpeTokenizer(other)._words is None


def test_build_follows_the_config(tmp_path):
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    assert build_tokenizer(DataConfig(tokenizer="bytes")).vocab_size == 258
    assert (
        build_tokenizer(DataConfig(tokenizer="bpe", bpe_vocab=400), documents).fingerprint()
        == BPE.fingerprint()
    )
    assert (
        build_tokenizer(DataConfig(tokenizer=str(BPE.save(tmp_path)))).fingerprint()
        == BPE.fingerprint()
    )


# -- Tokenizers made elsewhere ---------------------------------------------------------------------


def _sentencepiece_like() -> tokenizers.Tokenizer:
    """As Llama 2: "▁" for spaces, one put in front, unknown characters as bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for piece in ["▁", "h", "e", "l", "o", "é", "▁h", "▁he"]:
        vocab[piece] = len(vocab)
    model = models.BPE(
        vocab, [("▁", "h"), ("▁h", "e")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    hf = tokenizers.Tokenizer(model)
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    hf.decoder = decoders.Sequence(steps)
    hf.add_special_tokens(["<unk>", "<s>", "</s>"])
    return hf


def test_sentencepiece_with_byte_fallback():
    t = BpeTokenizer(_sentencepiece_like())
    assert (t.bos, t.eos) == (1, 2)
    for text in ["hello", "he llo héé", "日本 hello", "  he"]:
        ids = t.encode(text)
        assert t.decode(ids) == text
        assert t.token_bytes[ids].sum() == len(text.encode()) + 1  # the space put in front
        stream = t.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert t.token_bytes[t._hf.token_to_id("<0x0A>")] == 1
    assert t.token_bytes[t._hf.token_to_id("▁he")] == 3
    assert t.token_bytes[0] == 0


def test_metaspace():
    hf = tokenizers.Tokenizer(
        models.BPE({"<eos>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4}, [("▁", "a")])
    )
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Metaspace()
    hf.add_special_tokens(["<eos>"])
    t = BpeTokenizer(hf)
    assert t.decode(t.encode("a ab ba")) == "a ab ba"
    assert t.token_bytes.tolist() == [0, 1, 1, 1, 2]


def test_wordpiece():
    vocab = ["[CLS]", "[SEP]", "play", "##ing", "now"]
    hf = tokenizers.Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[SEP]")
    )
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.decoder = decoders.WordPiece()
    hf.add_special_tokens(vocab[:2])
    t = BpeTokenizer(hf)
    assert t.decode(t.encode("playing now")) == "playing now"
    assert t.token_bytes.tolist() == [0, 0, 5, 3, 4]


def _byte_level(specials: list[str], extra: list[str] = ()) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hf = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens(specials)
    hf.add_tokens(list(extra))
    return hf


@pytest.mark.parametrize(
    ("specials", "bos", "eos"),
    [
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
        (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>", "<|end_of_text|>"),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
        (["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_end|>"),
        (["<s>", "</s>"], "<s>", "</s>"),
        (["<bos>"], "<bos>", "<bos>"),
    ],
)
def test_document_ends_are_found_by_name(specials, bos, eos, tmp_path):
    hf = _byte_level(specials)
    hf.save(str(tmp_path / "tokenizer.json"))
    t = load_tokenizer(tmp_path)
    assert (t.bos, t.eos) == (hf.token_to_id(bos), hf.token_to_id(eos))


def test_truncation_padding_and_templates_of_a_file_are_ignored():
    hf = _byte_level(["<s>"])
    hf.enable_truncation(4)
    hf.enable_padding(length=10)
    hf.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 256)]
    )
    assert len(BpeTokenizer(hf).encode("eight ch")) == 8


def test_added_tokens_that_are_text_count_their_bytes():
    t = BpeTokenizer(_byte_level(["<s>"], extra=["    ", "日本"]))
    ids = t.encode("x    日本")
    assert len(ids) == 3 and t.token_bytes[ids].tolist() == [1, 4, 6]
    assert t.decode(ids) == "x    日本"


# -- Messages --------------------------------------------------------------------------------------


def _message(call, *args) -> str:
    with pytest.raises(DataError) as e:
        call(*args)
    return str(e.value)


@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe", b"[]", b'{"version": "1.0"}', b""])
def test_a_broken_tokenizer_json_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    message = _message(load_tokenizer, path)
    assert str(path) in message and "tokenizer.json" in message


def test_a_missing_tokenizer_is_named(tmp_path):
    assert str(tmp_path / "tokenizer.json") in _message(load_tokenizer, tmp_path)
    message = _message(build_tokenizer, DataConfig(tokenizer="/no/such.json"))
    assert "config.data.tokenizer" in message and "/no/such.json" in message


def test_a_tokenizer_without_document_ends_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(_byte_level(["<pad>"]).to_str())
    message = _message(load_tokenizer, path)
    assert str(path) in message and "<|endoftext|>" in message


def test_ids_beyond_int32_are_refused(tmp_path):
    config = json.loads(_byte_level(["<s>"]).to_str())
    config["model"]["vocab"]["zz"] = 2**31
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(config))
    assert "int32" in _message(load_tokenizer, path)
