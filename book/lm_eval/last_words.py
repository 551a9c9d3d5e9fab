"""The data of `docstring_last_word`: passages whose last word was said before."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from headbound import cache, corpus
from headbound.train import tunnel

_WORDS = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)*")
# Letters, figures and plain punctuation; no constants, double spaces or abbreviations.
_SENTENCE = re.compile(
    r"(?!.*([A-Z]{6}|\(\)|--| -|  |\b[ei]\.|\bcf\.|\betc\.))[A-Z](?:[\w ,;'\"()%-]|\.(?=\d))+\."
)


def _passage(content: str) -> dict[str, str] | None:
    """A text's first passage: two sentences or more, 20 to 90 words, the last word said before.

    Only runs of plain prose sentences count: no code, no cross-reference, no list, no heading. A
    name between backticks becomes a word.

    **Returns:** `context` without the last word, and `word`: lower-case, four letters or more.
    """
    for block in _blocks(content):
        run: list[str] = []
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", block):
            prose = len(_WORDS.findall(sentence)) > 3 and _SENTENCE.fullmatch(sentence)
            run = [*run, sentence] if prose else []
            for first in range(len(run) - 1):
                whole = " ".join(run[first:])[:-1]
                context, _, last = whole.rpartition(" ")
                said = _WORDS.findall(context)
                if re.fullmatch("[a-z]{4,}", last) and last in said and 19 <= len(said) <= 89:
                    return {"context": context, "word": last}
    return None


def _blocks(content: str) -> Iterator[str]:
    """Runs of lines with one indentation, each joined to one line."""
    plain = re.sub(r"(?<![:\w`])(``?)([A-Za-z_]\w*)\1(?![_`])", r"\2", content)
    for _, block in itertools.groupby(plain.splitlines(), key=_indentation):
        yield " ".join(" ".join(block).split())


def _indentation(line: str) -> tuple[int, bool]:
    return len(line) - len(line.lstrip()), bool(line.strip())


def last_words(source: str = "docstrings", **_: object) -> dict[str, Dataset]:
    """The local task's data, as lm-eval's `custom_dataset` asks for it.

    A passage that also stands in a text the suite trains on is left out.

    **Raises:** `ValueError` if no passage is left.
    """
    texts = corpus.load(source)
    key = cache.key(corpus.fingerprint(texts), tunnel.HELD_OUT, Path(__file__).read_bytes())

    def work() -> list[dict[str, str]]:
        train_texts, test_texts = corpus.split(texts, tunnel.HELD_OUT)
        trained = "\0".join(train_texts).replace("`", "")
        seen = " ".join(trained.split())
        unique = {}
        for passage in filter(None, map(_passage, test_texts)):
            whole = f"{passage['context']} {passage['word']}"
            if whole not in seen:
                unique[whole] = passage
        return list(unique.values())

    path = cache.cache_dir() / "tasks" / f"last-words-{key}.json"
    found = cache.kept(path, work)
    if not found:
        raise ValueError(f"source = {source!r}: no held-out passage fits the task; give more prose")
    return {"test": Dataset.from_list(found)}
