"""The text that every measurement runs on, and its stream of token ids."""

import ast
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.metadata import distribution, distributions, version
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from joblib import delayed
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe_models

from headbound.cache import cache_dir, replacing
from headbound.progress import bar, parallel

# A fixed list in a fixed order: what else is installed does not change the text.
PACKAGES = (
    *(
        "numpy",
        "scipy",
        "pandas",
        "matplotlib",
        "seaborn",
        "scikit-learn",
        "scikit-image",
        "statsmodels",
        "sympy",
    ),
    *("networkx", "torch", "transformers", "accelerate", "datasets", "huggingface_hub"),
)
CHUNK = 2000  # characters that a text cut out of a plain file has at least


def load(source: str = "docstrings") -> list[str]:
    """Texts in a fixed order.

    **Arguments:**

    - `source`: `"docstrings"` (unique docstrings of `PACKAGES`, about 38 MB of English technical prose);
      `"readmes"` (the prose paragraphs of the installed packages' long descriptions, one text a package); the path
      of a UTF-8 text file, cut at blank lines into texts of at least 2,000 characters; or a Hub dataset as
      `hf:NAME[/CONFIG][:SPLIT]`, whose `text` column is taken (`hf:owner/name/config` for a namespaced one).

    **Raises:** `FileNotFoundError` or `ValueError` for a source that is missing, empty or not UTF-8.
    """
    if source == "docstrings":
        return _docstrings()
    if source == "readmes":
        return _readmes()
    if source.startswith("hf:"):
        return _dataset(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"text = {source!r}: no such file; give 'docstrings', a text file or 'hf:NAME'"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text = {source!r}: not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error
    texts = _chunks(content)
    if not texts:
        raise ValueError(f"text = {source!r}: the file is empty; give a file with text in it")
    return texts


def split(texts: Sequence[str], held_out: float = 0.02) -> tuple[list[str], list[str]]:
    """Training and held-out texts, told apart by a hash of their content, so that the split outlives reordering."""
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


def _docstrings() -> list[str]:
    versions = {name: version(name) for name in PACKAGES}
    key = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]
    path = cache_dir() / "text" / f"docstrings-{key}.json"
    if not path.exists():
        files = [
            distribution(name).locate_file(file)
            for name in PACKAGES
            for file in sorted(distribution(name).files or [], key=str)
            if file.suffix == ".py" and "tests" not in file.parts  # test suites hold little prose
        ]
        found = parallel(
            [delayed(_file_docstrings)(file) for file in files], description="docstrings"
        )
        unique = dict.fromkeys(text for texts in found for text in texts)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(list(unique)))
    return json.loads(path.read_text())


def _file_docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):  # a package's own broken test input
        return []
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        text = ast.get_docstring(node)
        if text:
            # A lone surrogate, legal in Python source, is not text.
            found.append(text.encode(errors="ignore").decode())
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        waiting += [child for child in reversed(node.body) if isinstance(child, kinds)]
    return found


def _readmes() -> list[str]:
    texts = {}
    for package in distributions():
        # payload or header: both places are in use
        content = package.metadata.get_payload() or package.metadata.get("Description") or ""
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", content)]
        texts[package.name.lower()] = "\n\n".join(filter(_is_prose, paragraphs))
    return [texts[name] for name in sorted(texts) if texts[name]]


def _is_prose(paragraph: str) -> bool:
    plain = sum(c.isalpha() or c in " ,.;:'" for c in paragraph)
    sentence = paragraph[:1].isupper() and paragraph.endswith((".", ":"))
    return sentence and len(paragraph.split()) >= 20 and plain >= 0.95 * len(paragraph)


def _chunks(content: str) -> list[str]:
    texts, current = [], ""
    for paragraph in re.split(r"\n\s*\n", content):
        current = f"{current}\n\n{paragraph}".strip()
        if len(current) >= CHUNK:
            texts.append(current)
            current = ""
    return texts + ([current] if current else [])


def _dataset(source: str) -> list[str]:
    from datasets import load_dataset  # slow to import, rarely needed

    name, _, part = source.removeprefix("hf:").partition(":")
    owner, *rest = name.split("/")
    repository, config = ("/".join([owner, *rest[:1]]), rest[1] if len(rest) > 1 else None)
    try:
        data = load_dataset(repository, config, split=part or "train")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"text = {source!r}: {reason}; check the name, and that the hub is in reach"
        ) from error
    if "text" not in data.column_names:
        raise ValueError(
            f"text = {source!r}: columns {data.column_names}, none called 'text'; choose another dataset"
        )
    texts = [text for text in data["text"] if text and text.strip()]
    if not texts:
        raise ValueError(f"text = {source!r}: the dataset has no text; choose another")
    return texts


END_OF_TEXT = "<|endoftext|>"
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
BATCH = 4096  # texts encoded between two steps of the progress bar


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, trained once and kept in the cache.

    Id 0 is `<|endoftext|>`, as in GPT-NeoX.

    **Raises:** `ValueError` if the vocabulary can't hold the 256 bytes, or the text is too short to fill it.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size = {vocab_size}: a byte-level vocabulary needs at least 257 tokens"
        )
    path = cache_dir() / "tokenizers" / f"bpe-{vocab_size}-{fingerprint(texts)}.json"
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
            raise ValueError(
                f"vocab_size = {vocab_size}: the text yields only {tokenizer.get_vocab_size()}; "
                "use more text or a smaller vocabulary"
            )
        with replacing(path) as temporary:
            tokenizer.save(str(temporary))
    return load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder that has one.

    **Raises:** `FileNotFoundError` without the file, `ValueError` if it can't be read.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"tokenizer = {str(path)!r}: no {file.name} there; give a tokenizer.json or its folder"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"tokenizer = {str(path)!r}: not a tokenizer file ({error})") from error


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that separates texts.

    **Raises:** `ValueError` if the tokenizer has none of the usual end-of-text tokens.
    """
    ids = [tokenizer.token_to_id(token) for token in _ENDS]
    known = [i for i in ids if i is not None]
    if not known:
        raise ValueError(
            f"the tokenizer has none of {', '.join(_ENDS)}; add an end-of-text token to it"
        )
    return known[0]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Int32[np.ndarray, " tokens"]:
    """All texts as one stream of ids, an end-of-text id after each; kept in the cache, read memory-mapped.

    **Raises:** `ValueError` if there is no text.
    """
    if not len(texts):
        raise ValueError("no text to encode: the list of texts is empty")
    end = end_of_text(tokenizer)
    tokenizer_hash = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    path = cache_dir() / "tokens" / f"{fingerprint(texts)}-{tokenizer_hash}.npy"
    if not path.exists():
        parts = []
        for first in bar(range(0, len(texts), BATCH), "tokens"):
            for encoding in tokenizer.encode_batch_fast(
                list(texts[first : first + BATCH]), add_special_tokens=False
            ):
                parts.append(np.asarray([*encoding.ids, end], np.int32))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r")
