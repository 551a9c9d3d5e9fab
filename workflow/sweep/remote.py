"""The Hub, read with distrust: lists, ranges and files that agree with the hashes it gives, asked for again if not."""

import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx2
import tenacity
from filelock import FileLock
from huggingface_hub import HfApi, constants, errors, hf_hub_download, hf_hub_url
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from tokenizers import Tokenizer

from headbound.cache import cache_dir, replacing

disable_progress_bars()  # a notebook's outputs are published

T = TypeVar("T")
FORMATS = {"safetensors": "model", "bin": "pytorch_model"}
TIMEOUT = 60  # seconds without a byte before an answer counts as lost
TRIES = 12
WAIT = float(
    os.environ.get("HEADBOUND_WAIT", "1")
)  # seconds before the second try; it doubles up to a minute


class DamagedError(OSError):
    """An answer that contradicts itself, the listing or another answer; it is asked for again."""


class File(NamedTuple):
    """A file as the Hub lists it: size in bytes; SHA-256 of its content (in LFS), else git's blob id."""

    size: int
    content: str
    lfs: bool


class Listing(NamedTuple):
    """What a revision held at one moment; everything is then read at its commit, which can't change."""

    model: str
    revision: str
    commit: str
    files: dict[str, File]

    def weights(self) -> dict[str, dict[str, File]]:
        """The weight files of each format that is there, the one to read first."""
        found: dict[str, dict[str, File]] = {kind: {} for kind in FORMATS}
        for path, file in self.files.items():
            kind = path.rsplit(".", 1)[-1]
            if kind in FORMATS and path.startswith(FORMATS[kind]):
                found[kind][path] = file
        return {kind: files for kind, files in found.items() if files}


def listing(model: str, revision: str = "main", reads: int | None = None) -> Listing:
    """List a revision's files with their content hashes, without downloading any.

    **Raises:** `FileNotFoundError` or `PermissionError` for a model or revision that is missing, private or gated;
    `ConnectionError` if the Hub gave no good answer in `TRIES` tries.
    """

    def read() -> Listing:
        try:
            info = HfApi().model_info(
                model, revision=revision, files_metadata=True, timeout=TIMEOUT
            )
            rows = [
                (s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id, bool(s.lfs))
                for s in info.siblings
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, errors.HFValidationError):
                raise
            raise DamagedError(f"unreadable listing ({error!r})") from error
        return Listing(model, revision, info.sha, {name: File(*row) for name, *row in rows})

    return _ask(model, revision, read, reads)


def small_file(listed: Listing, path: str) -> bytes:
    """A small file's content, kept in the cache under its hash: revisions mostly share their tokenizer.

    **Raises:** `FileNotFoundError` if the revision does not have it; as `listing`.
    """
    if path not in listed.files:
        raise FileNotFoundError(
            f"revision = {listed.revision!r}: {listed.model} has no {path} there; choose another"
        )
    file = listed.files[path]
    kept = cache_dir() / "hub" / file.content

    def fetch() -> bytes:
        response = get_session().get(**_request(listed, path))
        hf_raise_for_status(response)
        if not _intact(io.BytesIO(response.content), file):
            raise DamagedError(f"{path}: its content is not what the Hub lists")
        return response.content

    if not kept.exists() or not _intact(kept.open("rb"), file):
        content = _ask(listed.model, listed.revision, fetch)
        with replacing(kept) as temporary:
            temporary.write_bytes(content)
    return kept.read_bytes()


def tokenizer(listed: Listing) -> Tokenizer:
    """A checkpoint's tokenizer, from its `tokenizer.json`."""
    return Tokenizer.from_buffer(small_file(listed, "tokenizer.json"))


def byte_range(listed: Listing, path: str, start: int, stop: int, reads: int | None) -> bytes:
    """Bytes `start` to `stop` of a file at the listed commit, from answers that agree with the listing."""
    file = listed.files[path]
    stop = min(stop, file.size)

    def read() -> bytes:
        with get_session().stream(
            "GET", **_request(listed, path, Range=f"bytes={start}-{stop - 1}")
        ) as response:
            hf_raise_for_status(response)
            hops = [
                hop.headers.get("X-Linked-ETag", "").strip('"')
                for hop in (*response.history, response)
            ]
            bounds = response.headers.get("Content-Range")
            if bounds != f"bytes {start}-{stop - 1}/{file.size}" or file.content not in hops:
                raise DamagedError(
                    f"{path}: asked for bytes {start}-{stop - 1} of {file}, got {bounds} of {hops}"
                )
            data = response.read()
        if len(data) != stop - start:
            raise DamagedError(f"{path}: {len(data)} bytes of {stop - start}")
        return data

    return _ask(listed.model, listed.revision, read, reads)


@contextmanager
def files(listed: Listing, paths: Sequence[str], keep: bool) -> Iterator[Path]:
    """A folder with whole files, each checked against its content hash; removed at the end unless `keep`."""
    folder = (
        cache_dir()
        / "checkpoints"
        / listed.model.replace("/", "--")
        / listed.revision.replace("/", "--")
    )
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(path: str) -> str:
        got = Path(hf_hub_download(listed.model, path, revision=listed.commit, local_dir=folder))
        if not _intact(got.open("rb"), listed.files[path]):
            got.unlink()
            raise DamagedError(f"{path}: its content is not what the Hub lists")
        return path

    with FileLock(f"{folder}.lock"):
        lacking = sum(listed.files[path].size for path in paths if not (folder / path).exists())
        if (free := shutil.disk_usage(folder).free) < lacking:
            raise OSError(
                f"{folder}: {lacking:,} bytes needed, {free:,} free; free some or set HEADBOUND_CACHE"
            )
        for path in paths:
            _ask(listed.model, listed.revision, partial(fetch, path))
        try:
            yield folder
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _ask(model: str, revision: str, read: Callable[[], T], reads: int | None = 1) -> T:
    """An answer that came `reads` times, each tried with growing pauses; what is final as one clear line."""
    needed = reads or (1 if constants.ENDPOINT.startswith("https://") else 2)
    stop, wait = tenacity.stop_after_attempt(TRIES), tenacity.wait_exponential(WAIT, max=60)
    retry = tenacity.Retrying(
        stop=stop, wait=wait, retry=tenacity.retry_if_exception(_passing), reraise=True
    )
    seen: Counter[bytes] = Counter()
    try:
        for _ in range(TRIES):
            answer = retry(read)
            digest = hashlib.sha256(
                answer if isinstance(answer, bytes) else repr(answer).encode()
            ).digest()
            seen[digest] += 1
            if seen[digest] == needed:
                return answer
        raise DamagedError(f"{TRIES} answers, no {needed} of them equal")
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"model = {model!r}: gated; accept its terms on the Hub and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"model = {model!r}: not on the Hub, or private; check it or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"revision = {revision!r}: {model} has none of that name on the Hub"
        ) from error
    except Exception as error:
        if not _passing(error) and not isinstance(error, errors.OfflineModeIsEnabled):
            raise
        why = " ".join(str(error).split())
        raise ConnectionError(
            f"{model} at {revision}: {why}; run again later, what is done is kept"
        ) from error


def _passing(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: the network's, the server's, or a damaged answer."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    network = (
        DamagedError,
        httpx2.TransportError,
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
    )
    return isinstance(error, network) or (
        type(error) is OSError and error.errno is None
    )  # a file of the wrong size


def _request(listed: Listing, path: str, **headers: str) -> dict[str, Any]:
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    return {
        "url": hf_hub_url(listed.model, path, revision=listed.commit),
        "headers": headers,
        "timeout": TIMEOUT,
    }


def _intact(stream: io.BufferedIOBase, file: File) -> bool:
    with stream:
        return (sha_fileobj(stream).hex() if file.lfs else git_hash(stream.read())) == file.content
