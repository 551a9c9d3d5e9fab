"""The text that every measurement runs on, and its stream of token ids."""

import ast
import hashlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import numpy as np
import parso
from huggingface_hub.utils import logging
from jaxtyping import Int32
from joblib import delayed
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe_models
from transformers import PreTrainedTokenizerBase

from headbound import cache, progress
from headbound.cache import cache_dir, replacing
from headbound.progress import bar, parallel

# A fixed list in a fixed order: what else is installed does not change the text.
PACKAGES = (
    *("numpy", "scipy", "pandas", "matplotlib", "seaborn", "scikit-learn", "scikit-image"),
    *("statsmodels", "sympy", "networkx", "torch", "transformers", "accelerate", "datasets"),
    "huggingface_hub",
)
GATHERING = 2  # counts the ways in which docstrings were gathered: another one, another text
CHUNK = 2000  # characters that a text cut out of a plain file has at least
LONG = 10 * CHUNK  # a paragraph above this is cut at its lines, a line at its sentences or words
# Where a text file is cut, coarse to fine, and what holds the pieces of one text together.
# Chinese and Japanese have no spaces.
CUTS = ((r"\n\s*\n", "\n\n"), (r"\n", "\n"), (r"(?<=[.!?])\s", " "), (r"(?<=[。！？])", ""))
CUTS += ((r"\s", " "),)
END_OF_TEXT = "<|endoftext|>"
# What the end token of a tokenizer that does not say so is called, the likeliest first.
ENDS = ("end.?of.?text", "</s>", r"(?<![a-z])eos(?![a-z])", "end.?of.?sentence", "eot", "im_end")
ENDS += ("end.?of.?turn", "eod", r"^\W*end\W*$", "return", r"(?<![a-z])sep(?![a-z])")
BATCH = 4096  # texts encoded between two steps of the progress bar


def load(source: str = "docstrings") -> list[str]:
    """Texts in a fixed order, of a source that is one of:

    - `"docstrings"`: unique docstrings of `PACKAGES`, about 38 MB of English technical prose.
    - `docstrings:NAME`: those of one installed package.
    - `"readmes"`: prose of the installed packages' descriptions, one text a package.
    - the path of a UTF-8 text file. It is cut at blank lines, or at lines if it has no blank ones,
      into texts of at least 2,000 characters.
    - `hf:NAME[/CONFIG][:SPLIT]`: the column `text` of a Hub dataset.

    **Raises:** `FileNotFoundError`, or `ValueError` for a source that is empty or not UTF-8.
    """
    if source == "docstrings":
        return _docstrings(PACKAGES)
    if source == "readmes":
        return _readmes()
    ways = {"hf": _dataset, "docstrings": _package}
    read = ways.get(source.partition(":")[0], _file)
    try:
        texts = read(source)
    except ValueError as error:
        raise ValueError(f"text = {source!r}: {error}") from error
    if not texts:
        raise ValueError(f"text = {source!r}: it has no text; choose another")
    return texts


def _file(source: str) -> list[str]:
    path = Path(source).expanduser()
    if not path.is_file():
        known = "give 'docstrings', a text file or 'hf:NAME'"
        raise FileNotFoundError(f"text = {source!r}: no such file; {known}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    if "\0" in content:
        raise ValueError("has NUL characters, as UTF-16 has; convert it to UTF-8")
    if _is_json(content):
        raise ValueError("it is JSON, whose syntax is no text; give the texts alone")
    return _chunks(content)


def _is_json(content: str) -> bool:
    """Whether it is a JSON object or an array with one, alone or with more JSON behind."""
    decoder = json.JSONDecoder()
    start = content.lstrip()
    with suppress(ValueError, RecursionError):
        found, end = decoder.raw_decode(start)
        behind = start[end:].lstrip(", \r\n\t")
        if behind:
            decoder.raw_decode(behind)  # which prose is not
        items = found if isinstance(found, list) else [found]
        return any(isinstance(item, dict) for item in items)
    return False


def split(texts: Sequence[str], held_out: float = 0.02) -> tuple[list[str], list[str]]:
    """Training and held-out texts, told apart by a hash of their content, in whatever order."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out = {held_out}: must be a share between 0 and 1")
    parts: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        parts[share < held_out].append(text)
    return parts


def fingerprint(texts: Sequence[str]) -> str:
    """A short hash (SHA-256, 16 hexadecimal digits) of the texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        # A byte that UTF-8 never uses stands for NUL, so that no text looks like two.
        digest.update(text.encode().replace(b"\0", b"\xff") + b"\0")
    return digest.hexdigest()[:16]


def _package(source: str) -> list[str]:
    name = source.removeprefix("docstrings:")
    try:
        return _docstrings([name])
    except PackageNotFoundError as error:
        raise ValueError(f"no package {name!r} is installed; name another") from error


def _docstrings(packages: Sequence[str]) -> list[str]:
    python = ".".join(map(str, sys.version_info[:2]))
    key = cache.key("docstrings", GATHERING, python, libraries=[*packages, "parso"])

    def work() -> list[str]:
        files = [
            package.locate_file(file)
            for package in map(distribution, packages)
            for file in sorted(package.files or [], key=str)
            if file.suffix == ".py" and "tests" not in file.parts  # those hold little prose
        ]
        jobs = [delayed(_files_docstrings)(files[i : i + 64]) for i in range(0, len(files), 64)]
        found = parallel(jobs, description="docstrings")
        return list(dict.fromkeys(text for texts in found for text in texts))

    return cache.kept(cache_dir() / "text" / f"docstrings-{key}.json", work)


def _files_docstrings(paths: Sequence[Path]) -> list[str]:
    with progress.uncollected():  # a third of the time
        return [text for path in paths for text in _file_docstrings(path)]


def _file_docstrings(path: Path) -> list[str]:
    """A file's docstrings in its order, whichever Python reads it and whichever it is written for.

    What this Python's own parser refuses, for it is too new or too old, goes to parso's, which
    skips what it can't read.
    """
    source = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages' own escapes
        try:
            found = _by_ast(ast.parse(source))
        except (SyntaxError, ValueError):
            text = source.decode(errors="ignore")
            found = _by_parso(parso.parse(text, version="3.13"))
        # A lone surrogate, legal in Python source, is not text.
        return [text.encode(errors="ignore").decode() for text in found if text]


def _by_ast(scope: ast.AST) -> Iterator[str | None]:
    yield ast.get_docstring(scope)
    for inner in scope.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _by_ast(inner)


def _by_parso(scope: parso.python.tree.Scope) -> Iterator[str]:
    quoted = scope.get_doc_node()
    if quoted is not None:
        yield inspect.cleandoc(ast.literal_eval(quoted.get_code(False)))
    for inner in [*scope.iter_funcdefs(), *scope.iter_classdefs()]:
        yield from _by_parso(inner)


def _readmes() -> list[str]:
    texts = {}
    for package in distributions():
        # payload or header: both places are in use
        said = package.metadata
        content = said.get_payload() or said.get("Description") or ""
        parts = re.split(r"\n\s*\n", content)
        paragraphs = [" ".join(part.split()) for part in parts]
        texts[package.name.lower()] = "\n\n".join(filter(_is_prose, paragraphs))
    return [texts[name] for name in sorted(texts) if texts[name]]


def _is_prose(paragraph: str) -> bool:
    plain = sum(c.isalpha() or c in " ,.;:'" for c in paragraph)
    sentence = paragraph[:1].isupper() and paragraph.endswith((".", ":"))
    return sentence and len(paragraph.split()) >= 20 and plain >= 0.95 * len(paragraph)


def _chunks(content: str, cuts: Sequence[tuple[str, str]] = CUTS) -> list[str]:
    """Texts of at least `CHUNK` characters, from paragraphs, or from parts of a `LONG` one."""
    (cut, joint), *finer = cuts
    texts = []
    current = ""
    for piece in re.split(cut, content):
        parts = [piece]
        if len(piece) > LONG and finer:
            parts = _chunks(piece, finer)
        for part in parts:
            current = f"{current}{joint}{part}".strip()
            if len(current) >= CHUNK:
                texts.append(current)
                current = ""
    return texts + ([current] if current else [])


def _dataset(source: str) -> list[str]:
    from datasets import load_dataset  # slow to import, rarely needed

    name, _, part = source.removeprefix("hf:").partition(":")
    owner, *rest = name.split("/")
    repository = "/".join([owner, *rest[:1]])
    config = rest[1] if len(rest) > 1 else None
    logging.set_verbosity_error()  # its retries are no news to a reader
    try:
        data = load_dataset(repository, config, split=part or "train")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{reason}; check the name, and that the hub is in reach") from error
    if "text" not in data.column_names:
        raise ValueError(f"columns {data.column_names}, none called 'text'; choose another dataset")
    return [text for text in data["text"] if text and text.strip()]


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, kept in the cache.

    Id 0 is `<|endoftext|>`, as in GPT-NeoX.

    **Raises:** `ValueError` if it can't hold the 256 bytes, or the text is too short to fill it.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size = {vocab_size}: a byte-level vocabulary needs at least 257")
    key = cache.key(fingerprint(texts), libraries=["tokenizers"])
    path = cache_dir() / "tokenizers" / f"bpe-{vocab_size}-{key}.json"
    if not path.exists():
        tokenizer = Tokenizer(bpe_models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        if tokenizer.get_vocab_size() != vocab_size:
            yields = f"the text yields only {tokenizer.get_vocab_size()}"
            raise ValueError(f"vocab_size = {vocab_size}: {yields}; use more text or fewer tokens")
        with replacing(path) as temporary:
            tokenizer.save(str(temporary))
    return load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder that has one.

    **Raises:** `ValueError` if it can't be read.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        fix = "give a tokenizer.json or its folder"
        raise ValueError(f"tokenizer = {str(path)!r}: {error}; {fix}") from error


def end_of_text(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> int:
    """The id that separates texts: the tokenizer's own, or the special token named like one.

    **Raises:** `ValueError` if the tokenizer has none.
    """
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None:
        return own
    bare = getattr(tokenizer, "backend_tokenizer", tokenizer)
    special = {str(t.content): i for i, t in bare.get_added_tokens_decoder().items() if t.special}
    vocabulary = bare.get_vocab(with_added_tokens=True)
    special |= {token: vocabulary[token] for token in ("</s>", END_OF_TEXT) if token in vocabulary}
    for name in ENDS:
        for token, number in special.items():
            if re.search(name, token, re.IGNORECASE):
                return number
    known = f"its special ones, {sorted(special)[:9]}"
    raise ValueError(f"the tokenizer has no end-of-text token among {known}; add one to it")


def encode(
    tokenizer: Tokenizer | PreTrainedTokenizerBase, texts: Sequence[str]
) -> Int32[np.ndarray, " tokens"]:
    """All texts as one stream of ids, an end-of-text id after each; kept in the cache.

    **Returns:** memory-mapped, read-only.

    **Raises:** `ValueError` if there is no text.
    """
    if not len(texts):
        raise ValueError("no text to encode: the list of texts is empty")
    end = end_of_text(tokenizer)
    bare = getattr(tokenizer, "backend_tokenizer", tokenizer)
    key = cache.key(fingerprint(texts), bare.to_str(), end, libraries=["tokenizers"])
    path = cache_dir() / "tokens" / f"{key}.npy"
    if not path.exists():
        parts = []
        for first in bar(range(0, len(texts), BATCH), "tokens"):
            some = list(texts[first : first + BATCH])
            for encoding in bare.encode_batch_fast(some, add_special_tokens=False):
                parts.append(np.asarray([*encoding.ids, end], np.int32))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r")
