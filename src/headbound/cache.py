"""Where downloads and results in between live, and how a file there is written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


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
        raise OSError(
            f"writing {path}: {error}; free some space or set HEADBOUND_CACHE to another disk"
        ) from error
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)
