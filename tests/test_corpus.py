import ast
import gc
import json
import random

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from headbound import corpus

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=6)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(tmp_path, content):
    path = tmp_path / "input.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_file_is_cut_at_blank_lines_into_texts_of_a_length(tmp_path):
    paragraphs = [f"{i} " + "word " * (20 * i) for i in range(40)]
    texts = corpus.load(written(tmp_path, "\n\n".join(paragraphs)))
    assert all(len(t) >= corpus.CHUNK for t in texts[:-1])
    assert "\n\n".join(texts).split() == " ".join(paragraphs).split()
    assert all(any(p.strip() in t for t in texts) for p in paragraphs)  # no paragraph is cut


@pytest.mark.parametrize("separator", ["\r\n\r\n", "\n \t\n", "\n\n\n\n"])
def test_any_blank_line_will_do(tmp_path, separator):
    halves = ["a" * corpus.CHUNK, "β" * corpus.CHUNK]
    assert corpus.load(written(tmp_path, separator.join(halves))) == halves


@given(st.text(st.characters(codec="utf-8")))
def test_no_character_but_white_space_is_lost(content):
    assert "".join("".join(corpus._chunks(content)).split()) == "".join(content.split())


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_file(tmp_path, content):
    with pytest.raises(ValueError, match=r"input.txt': it has no text; choose another"):
        corpus.load(written(tmp_path, content))


def test_a_file_that_is_not_utf_8(tmp_path):
    with pytest.raises(ValueError, match=r"input.txt': not UTF-8 at byte 3; convert it to UTF-8"):
        corpus.load(written(tmp_path, "abcé".encode("latin-1")))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match="no such file; give 'docstrings', a text file or 'hf:NAME'"
    ):
        corpus.load(str(tmp_path / name))


def test_a_dataset_out_of_reach_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^text = 'hf:nobody/nothing:test': ") as raised:
        corpus.load("hf:nobody/nothing:test")
    line = str(raised.value)
    assert "\n" not in line
    assert line.endswith("; check the name, and that the hub is in reach")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:wikitext", ("wikitext", None, "train")),
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name/config:test[:1%]", ("owner/name", "config", "test[:1%]")),
    ],
)
def test_what_a_dataset_name_asks_for(monkeypatch, source, asked):
    import datasets

    seen = []

    def load_dataset(name, config, split):
        seen.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one", "", "  ", None, "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert corpus.load(source) == ["one", "two"]
    assert seen == [asked]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, r"columns \['body'\], none called 'text'"),
        ({"text": [" "]}, "it has no text"),
    ],
)
def test_a_dataset_without_text(monkeypatch, columns, message):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(columns)
    )
    with pytest.raises(ValueError, match=message):
        corpus.load("hf:some/thing")


def test_docstrings_are_unique_text_in_a_fixed_order(cache, monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGES", ("filelock", "tqdm"))
    texts = corpus.load("docstrings")
    assert len(texts) > 50
    assert len(set(texts)) == len(texts)
    (cache / "text").rename(cache / "before")
    assert corpus.load("docstrings") == texts
    assert all(t == t.strip() for t in texts)
    some = corpus.load("docstrings:tqdm")
    assert set(some) < set(texts)
    with pytest.raises(ValueError, match="no package 'nonesuch' is installed"):
        corpus.load("docstrings:nonesuch")
    assert gc.isenabled()


def test_docstrings_of_a_file_in_its_order(tmp_path):
    source = '"""Module."""\nclass A:\n    "Class."\n    def f(self):\n        "Method."\nasync def g():\n    "Function."\n'
    path = tmp_path / "module.py"
    path.write_text(source + 'def h():\n    "lone \\udc80 surrogate"\n')
    assert corpus._file_docstrings(path) == [
        "Module.",
        "Class.",
        "Method.",
        "Function.",
        "lone  surrogate",
    ]
    path.write_bytes(b"def (:")
    assert corpus._file_docstrings(path) == []


def test_a_file_for_another_python_gives_the_same_docstrings(tmp_path, recwarn):
    source = '"""Mo\\dule."""\nclass A:\n    def f(self):\n        """One.\n\n        Two.\n        """\n'
    (tmp_path / "plain.py").write_text(source)
    (tmp_path / "older.py").write_text(source + "print 'Python 2'\n")
    (tmp_path / "newer.py").write_text(source + "type X[*T = int] = list[T]\n")
    texts = [
        corpus._file_docstrings(tmp_path / f"{name}.py") for name in ("plain", "older", "newer")
    ]
    assert texts == [["Mo\\dule.", "One.\n\nTwo."]] * 3
    assert not [w for w in recwarn if "escape" in str(w.message)]
    with pytest.raises(SyntaxError):
        ast.parse("print 'Python 2'")


def test_one_document_a_line_is_many_texts(tmp_path):
    lines = [f"{i} " + "word " * 60 for i in range(2000)]
    texts = corpus.load(written(tmp_path, "\n".join(lines)))
    assert len(texts) > 200
    assert all(any(line.strip() in text for text in texts) for line in lines[::100])


def test_a_text_in_one_line_is_cut_at_its_sentences(tmp_path):
    texts = corpus.load(written(tmp_path, "This is a sentence. " * 3000))
    assert " ".join(texts) == ("This is a sentence. " * 3000).strip()
    assert all(text.endswith("sentence.") and len(text) < 2 * corpus.CHUNK for text in texts)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("utf-16", "not UTF-8 at byte 0"), ("utf-16-le", "has NUL characters, as UTF-16 has")],
)
def test_utf_16_is_refused(tmp_path, encoding, message):
    with pytest.raises(ValueError, match=message):
        corpus.load(written(tmp_path, "the same plain words".encode(encoding)))


def test_a_mark_at_the_start_is_dropped(tmp_path):
    assert corpus.load(written(tmp_path, "plain words".encode("utf-8-sig"))) == ["plain words"]


def test_the_split_follows_the_content_alone():
    texts = [f"text {i}" for i in range(4000)]
    train, held_out = corpus.split(texts, 0.1)
    assert sorted(train + held_out) == sorted(texts)
    assert 300 < len(held_out) < 500
    shuffled = random.Random(0).sample(texts, len(texts))
    assert set(corpus.split(shuffled, 0.1)[1]) == set(held_out)
    assert set(corpus.split(texts, 0.2)[1]) > set(held_out)  # a larger share holds the smaller one
    assert corpus.split(texts[:1000], 0.1)[1] == [t for t in texts[:1000] if t in set(held_out)]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_share(share):
    with pytest.raises(ValueError, match=r"held_out = .*: must be a share between 0 and 1"):
        corpus.split(["a"], share)


@given(TEXTS, TEXTS)
def test_fingerprints_tell_lists_apart(one, other):
    assert (corpus.fingerprint(one) == corpus.fingerprint(other)) == (one == other)


def test_fingerprints_tell_a_nul_from_a_boundary():
    assert (
        len(
            {
                corpus.fingerprint(t)
                for t in (["a\0b"], ["a", "b"], ["a", "", "b"], ["a\0", "b"], ["ab"])
            }
        )
        == 5
    )
    assert (
        corpus.fingerprint(["a"]) == "ffe9aaeaa2a2d504"
    )  # the same on any machine: caches are keyed on it


@pytest.mark.parametrize("layout", ["lines", "array", "object"])
def test_json_is_refused_for_its_syntax_is_no_text(tmp_path, layout):
    documents = [{"text": f"{number} plain words stand here. " * 90} for number in range(9)]
    content = {
        "lines": "\n".join(map(json.dumps, documents)),
        "array": json.dumps(documents, indent=1),
        "object": json.dumps({"data": documents}, indent=1),
    }
    (tmp_path / "t.json").write_text(content[layout], encoding="utf-8")
    with pytest.raises(ValueError, match="it is JSON, whose syntax is no text"):
        corpus.load(str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    "prose",
    [
        "[1] A list of references.\n\n{x} is a set.",
        '{"role": "user"}\n\n[Note] The record above opens a conversation.',
        '{"name": "bert"} is how a configuration begins.\n\nThis text explains it.',
        '[{"name": "bert"}] is a list of configurations.',
    ],
)
def test_prose_that_begins_with_json_is_text(tmp_path, prose):
    (tmp_path / "t.txt").write_text(prose, encoding="utf-8")
    assert len(corpus.load(str(tmp_path / "t.txt"))) == 1


def test_a_long_line_without_spaces_is_cut_at_its_sentences(tmp_path):
    sentence = "这是一个句子。另一个句子在这里！"
    (tmp_path / "t.txt").write_text(sentence * 20_000, encoding="utf-8")
    texts = corpus.load(str(tmp_path / "t.txt"))
    assert "".join(texts) == sentence * 20_000
    assert {len(text) for text in texts[:-1]} == {2000}
