"""The text every measurement runs on: the installed scientific stack's docstrings, a file, or a Hub dataset."""

import ast
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution, distributions, version
from pathlib import Path

import platformdirs
from joblib import delayed

from headbound.progress import parallel

# A fixed list in a fixed order: what else is installed does not change the text.
PACKAGES = (
    *("numpy", "scipy", "pandas", "matplotlib", "seaborn", "scikit-learn", "scikit-image", "statsmodels", "sympy"),
    *("networkx", "torch", "transformers", "accelerate", "datasets", "huggingface_hub"),
)
CHUNK = 2000  # characters that a text cut out of a plain file has at least


def cache_dir() -> Path:
    """Where downloads and results in between live, outside the repository: `HEADBOUND_CACHE` or the user's cache."""
    path = Path(os.environ.get("HEADBOUND_CACHE") or platformdirs.user_cache_path("headbound"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cache folder {path}: {error.strerror}; set HEADBOUND_CACHE to a folder you can write"
        ) from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well: a kill leaves nothing or the whole.

    **Raises:** `OSError` naming the folder and the fix where there is no space.
    """
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"writing {path}: {error}; free some space or set HEADBOUND_CACHE to another disk") from error
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)


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
        raise FileNotFoundError(f"text = {source!r}: no such file; give 'docstrings', a text file or 'hf:NAME'")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text = {source!r}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
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
        found = parallel([delayed(_file_docstrings)(file) for file in files], description="docstrings")
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
        raise ValueError(f"text = {source!r}: {reason}; check the name, and that the hub is in reach") from error
    if "text" not in data.column_names:
        raise ValueError(f"text = {source!r}: columns {data.column_names}, none called 'text'; choose another dataset")
    texts = [text for text in data["text"] if text and text.strip()]
    if not texts:
        raise ValueError(f"text = {source!r}: the dataset has no text; choose another")
    return texts
