"""Where results in between live, how they are named, and how a file is written whole."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder `HEADBOUND_CACHE`, or the user's own cache folder: outside the repository."""
    named = os.environ.get("HEADBOUND_CACHE") or platformdirs.user_cache_path("headbound")
    path = Path(named).expanduser()
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def key(*parts: object, libraries: Sequence[str] = ()) -> str:
    """The name of a result in the cache: a hash of everything that decides the result.

    A part is bytes, or anything that JSON can say. `libraries` add the versions of packages.

    >>> key("text", {"length": 128}) == key("text", {"length": 128})
    True
    >>> key("text", {"length": 128}) == key("text", {"length": 64})
    False
    """
    digest = hashlib.sha256()
    versions = {name: version(name) for name in libraries}
    for part in (*parts, versions):
        said = part
        if not isinstance(part, bytes):
            said = json.dumps(part, sort_keys=True, default=str).encode()
        start = f"{isinstance(part, bytes)} {len(said)} "
        digest.update(start.encode() + said)
    return digest.hexdigest()[:24]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses inside is said in one line: an `OSError` with the path and the fix."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        fix = "free some space, or set HEADBOUND_CACHE to a folder you can write"
        raise OSError(f"writing {path}: {reason}; {fix}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well.

    A process that is killed leaves the old file or the new one, never a part.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(6)}")
        try:
            temporary.touch()  # not mkstemp, whose files only their owner may read
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
