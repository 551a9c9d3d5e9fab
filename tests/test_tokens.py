"""Byte-level tokenizers, and streams of ids."""

import numpy as np
import pytest
import tiny
import transformers
from tokenizers import Tokenizer, models

from headbound import corpus

PHRASES = [tiny.TEXT * 2, "Zwölf Boxkämpfer jagen Viktor.\n\tπ ≈ 3.14159 🙂", "", tiny.TEXT]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("size", [257, 258, 300])
def test_a_vocabulary_has_exactly_the_size_asked(size):
    tokenizer = corpus.train_bpe(PHRASES, size)
    assert tokenizer.get_vocab_size() == size
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in PHRASES:  # every text of any language comes back byte for byte
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (256, "vocab_size = 256: a byte-level vocabulary needs at least 257"),
        (9999, "vocab_size = 9999: the text yields"),
    ],
)
def test_an_impossible_vocabulary(size, message, cache):
    with pytest.raises(ValueError, match=message):
        corpus.train_bpe(PHRASES, size)
    assert not list(cache.rglob("*.json"))


def test_training_happens_once_a_text_and_size(monkeypatch):
    first = corpus.train_bpe(PHRASES, 280)
    monkeypatch.setattr(
        Tokenizer, "train_from_iterator", lambda *_: pytest.fail("trained again"), raising=False
    )
    monkeypatch.setattr(
        corpus, "Tokenizer", type("Untrainable", (), {"from_file": Tokenizer.from_file})
    )
    assert corpus.train_bpe(PHRASES, 280).to_str() == first.to_str()


def test_loading_from_a_file_or_its_folder(tmp_path):
    tiny.fast_tokenizer().save_pretrained(tmp_path / "folder")
    expected = tiny.tokenizer().get_vocab()
    assert corpus.load_tokenizer(tmp_path / "folder").get_vocab() == expected
    assert (
        corpus.load_tokenizer(str(tmp_path / "folder" / "tokenizer.json")).get_vocab() == expected
    )


def test_a_tokenizer_that_is_not_there(tmp_path):
    for place in (tmp_path, tmp_path / "other.json"):
        with pytest.raises(
            ValueError, match=r"No such file.*; give a tokenizer.json or its folder"
        ):
            corpus.load_tokenizer(place)


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe"])
def test_a_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer = .*; give a tokenizer.json") as error:
        corpus.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_stream_is_every_text_and_its_end(monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 3)
    tokenizer = corpus.train_bpe(PHRASES, 280)
    stream = corpus.encode(tokenizer, PHRASES)
    assert stream.dtype == np.int32
    expected = [i for text in PHRASES for i in [*tokenizer.encode(text).ids, 0]]
    assert stream.tolist() == expected
    assert not stream.flags.writeable


def test_a_stream_is_kept_under_its_text_and_tokenizer(cache, monkeypatch):
    one, other = corpus.train_bpe(PHRASES, 280), corpus.train_bpe(PHRASES, 300)
    first = corpus.encode(one, PHRASES)
    assert len(corpus.encode(other, PHRASES)) < len(first)
    corpus.encode(one, PHRASES[:2])
    assert len(list((cache / "tokens").iterdir())) == 3
    monkeypatch.setattr(corpus, "bar", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(corpus.encode(one, list(PHRASES)), first)


def test_an_interrupted_encoding_leaves_nothing(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    tokenizer = corpus.train_bpe(PHRASES, 280)
    monkeypatch.setattr(corpus.np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.encode(tokenizer, PHRASES)
    assert not list((cache / "tokens").iterdir())


def test_no_text_to_encode():
    with pytest.raises(ValueError, match="the list of texts is empty"):
        corpus.encode(tiny.tokenizer(), [])


def test_the_end_of_text_is_the_first_known():
    def having(*names):
        return Tokenizer(
            models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0])
        )

    assert corpus.end_of_text(having("a", "</s>", "b")) == 1
    assert corpus.end_of_text(having("[SEP]", "<|endoftext|>")) == 1
    with pytest.raises(ValueError, match=r"no end-of-text token among its special ones"):
        corpus.end_of_text(having("a", "b"))


@pytest.mark.parametrize(
    "end",
    [
        "<|endoftext|>",
        "</s>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|END_OF_TURN_TOKEN|>",
        "<EOS_TOKEN>",
        "<|eot_id|>",
        "<|return|>",
        "<eos>",
        "<|im_end|>",
        "<end_of_turn>",
        "[|endofturn|]",
        "<eod>",
        "<|end|>",
        "[SEP]",
    ],
)
def test_end_tokens_of_many_families(end):
    made = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    made.add_special_tokens(["<pad>", end])
    assert corpus.end_of_text(made) == 2


@pytest.mark.parametrize("other", ["<|geos|>", "<|separator|>", "<|video|>", "<|endofprompt|>"])
def test_a_special_token_that_only_sounds_like_an_end_is_none(other):
    made = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    made.add_special_tokens([other])
    with pytest.raises(ValueError, match="no end-of-text token"):
        corpus.end_of_text(made)


def test_the_tokenizers_own_end_is_asked_first():
    made = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    made.add_special_tokens(["</s>", "<stop>"])
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<stop>")
    assert corpus.end_of_text(words) == words.eos_token_id == 2
    assert corpus.encode(words, ["a"]).tolist() == [0, 2]
