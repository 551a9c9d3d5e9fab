"""Published checkpoints: read no more of one than is needed, and check that it is what its name says."""

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeVar

import httpx2
import pandas as pd
import tenacity
import torch
from filelock import FileLock
from huggingface_hub import HfApi, constants, errors, hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from jaxtyping import Float
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from headbound.text import cache_dir, replacing

disable_progress_bars()  # a notebook's outputs are published

T = TypeVar("T")
HEADS = ("embed_out.weight", "lm_head.weight")
TIED = ("embed_in.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight")
FORMATS = {"safetensors": "model", "bin": "pytorch_model"}
HEADER = 16_384  # bytes of a safetensors file asked for first; most headers fit
TIMEOUT = 60  # seconds without a byte before an answer counts as lost
TRIES = 12
WAIT = float(os.environ.get("HEADBOUND_WAIT", "1"))  # seconds before the second try; it doubles up to a minute


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


class Head(NamedTuple):
    """A head as stored, padding rows included; its tensor's name, and the bytes it took to fetch."""

    weight: Float[Tensor, "rows d"]
    name: str
    fetched: int
    listed: Listing


def listing(model: str, revision: str = "main", reads: int | None = None) -> Listing:
    """List a revision's files with their content hashes, without downloading any.

    **Raises:** `FileNotFoundError` or `PermissionError` for a model or revision that is missing, private or gated;
    `ConnectionError` if the Hub gave no good answer in `TRIES` tries.
    """

    def read() -> Listing:
        try:
            info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=TIMEOUT)
            rows = [(s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id, bool(s.lfs)) for s in info.siblings]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, errors.HFValidationError):
                raise
            raise DamagedError(f"unreadable listing ({error!r})") from error
        return Listing(model, revision, info.sha, {name: File(*row) for name, *row in rows})

    return _ask(model, revision, read, reads)


def head(model: str, revision: str = "main", reads: int | None = None, keep: bool = False) -> Head:
    """Fetch a checkpoint's head alone: one tensor's bytes out of safetensors, or one whole `.bin` file.

    Checked of each range: bounds, length, the file's size and hash as listed, its header, finite values. As a SHA-256
    covers a whole file only, the bytes themselves rest on the transport (https authenticates them) or on equal
    answers: a server that is wrong each time in the same way goes unnoticed. Whole files are checked against
    their SHA-256.

    **Arguments:**

    - `reads`: how many equal answers to ask for; None: one over https, two otherwise.
    - `keep`: leave a `.bin` file in the cache.

    **Raises:** as `listing`; `ValueError` for a checkpoint without a head, or with NaN or Inf in it.
    """
    listed = listing(model, revision, reads)
    kind = next(iter(listed.weights()), None)
    if kind is None:
        raise ValueError(f"revision = {revision!r}: {model} has no .safetensors or .bin there; choose another")
    path = f"{FORMATS[kind]}.{kind}"
    if path not in listed.files:
        where = json.loads(small_file(listed, f"{path}.index.json"))["weight_map"]
        path = where[_head_name(listed, where)]
    if kind == "bin":
        with _files(listed, [path], keep) as folder:
            mapped = zipfile.is_zipfile(folder / path)
            try:
                state = torch.load(folder / path, map_location="cpu", weights_only=True, mmap=mapped)
            except UnpicklingError as error:
                raise ValueError(f"{model} at {revision}: {path} holds more than weights; not loaded") from error
            name = _head_name(listed, state)
            return _checked(listed, state[name].clone(), name, listed.files[path].size)
    data = _range(listed, path, 0, HEADER, reads)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        data += _range(listed, path, len(data), start, reads)
    header = json.loads(data[8:start])
    name = _head_name(listed, header)
    begin, end = header[name]["data_offsets"]
    # A file of this one tensor, for the library to read.
    alone = json.dumps({name: {**header[name], "data_offsets": [0, end - begin]}}).encode()
    tensor = _range(listed, path, start + begin, start + end, reads)
    weight = load(len(alone).to_bytes(8, "little") + alone + tensor)[name]
    return _checked(listed, weight, name, len(data) + len(tensor))


@contextmanager
def local(model: str, revision: str = "main", keep: bool = False) -> Iterator[tuple[Path, Listing]]:
    """A whole checkpoint in a folder, each file checked against its hash; removed after, unless `keep`.

    **Raises:** as `listing`; `ValueError` for a model that needs code of its own; `OSError` on a full disk.
    """
    listed = listing(model, revision)
    config = json.loads(small_file(listed, "config.json"))
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"model = {model!r}: it needs code of its own, which is never run; choose another model")
    texts = [p for p in listed.files if "/" not in p and p.endswith((".json", ".txt", ".model"))]
    with _files(listed, [*texts, *next(iter(listed.weights().values()), {})], keep) as folder:
        yield folder, listed


def audit(model: str, names: Sequence[str]) -> pd.DataFrame:
    """Compare the content hashes that the Hub lists for revisions, given in training order; no weights move.

    Two whole checkpoints that swapped their names have hashes like any others: hashes can't show that.

    **Returns:** a row for each, with its commit, `detail` saying with whom, and `status` one of

    - `ok`;
    - `identical`: the same weights as others, so at most one is what its name says (the last is believed where `main`
      equals it);
    - `suspicious`: some weight files are another's too, or over 1 % off that file's usual size;
    - `missing`: no such revision, or no weights in it.
    """

    def look(name: str) -> Listing | None:
        with suppress(FileNotFoundError):
            return listing(model, name)

    with ThreadPoolExecutor(8) as pool:
        listed = dict(zip(["main", *names], pool.map(look, ["main", *names]), strict=True))
    found = {name: each.weights() if each else {} for name, each in listed.items()}
    owners, sizes = defaultdict(set), defaultdict(list)
    for name in names:
        for path, file in ChainMap(*found[name].values()).items():
            owners[file.content].add(name)
            sizes[path].append(file.size)
    usual = {path: sorted(values)[len(values) // 2] for path, values in sizes.items()}

    def judge(name: str) -> tuple[str, str]:
        kinds = found[name]
        if not kinds:
            return "missing", "no weights in it" if listed[name] else "no such revision"
        if name == names[-1] and any(found["main"].get(kind) == files for kind, files in kinds.items()):
            return "ok", ""
        sharers = [[owners[f.content] - {name} for f in files.values()] for files in kinds.values()]
        alike = set().union(*(set.intersection(*each) for each in sharers))
        others = ", ".join(sorted(alike or set().union(*chain(*sharers)), key=list(names).index))
        if others:
            return ("identical", others) if alike else ("suspicious", f"shares files with {others}")
        odd = [p for p, file in ChainMap(*kinds.values()).items() if abs(file.size / usual[p] - 1) > 0.01]
        return ("suspicious", f"unusual size: {', '.join(odd)}") if odd else ("ok", "")

    rows = [(model, name, *judge(name), getattr(listed[name], "commit", "")) for name in names]
    return pd.DataFrame(rows, columns=["model", "revision", "status", "detail", "commit"])


def small_file(listed: Listing, path: str) -> bytes:
    """A small file's content, kept in the cache under its hash: revisions mostly share their tokenizer.

    **Raises:** `FileNotFoundError` if the revision does not have it; as `listing`.
    """
    if path not in listed.files:
        raise FileNotFoundError(f"revision = {listed.revision!r}: {listed.model} has no {path} there; choose another")
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


def _ask(model: str, revision: str, read: Callable[[], T], reads: int | None = 1) -> T:
    """An answer that came `reads` times, each tried with growing pauses; what is final as one clear line."""
    needed = reads or (1 if constants.ENDPOINT.startswith("https://") else 2)
    stop, wait = tenacity.stop_after_attempt(TRIES), tenacity.wait_exponential(WAIT, max=60)
    retry = tenacity.Retrying(stop=stop, wait=wait, retry=tenacity.retry_if_exception(_passing), reraise=True)
    seen: Counter[bytes] = Counter()
    try:
        for _ in range(TRIES):
            answer = retry(read)
            digest = hashlib.sha256(answer if isinstance(answer, bytes) else repr(answer).encode()).digest()
            seen[digest] += 1
            if seen[digest] == needed:
                return answer
        raise DamagedError(f"{TRIES} answers, no {needed} of them equal")
    except errors.GatedRepoError as error:
        raise PermissionError(f"model = {model!r}: gated; accept its terms on the Hub and set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(f"model = {model!r}: not on the Hub, or private; check it or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"revision = {revision!r}: {model} has none of that name on the Hub") from error
    except Exception as error:
        if not _passing(error) and not isinstance(error, errors.OfflineModeIsEnabled):
            raise
        why = " ".join(str(error).split())
        raise ConnectionError(f"{model} at {revision}: {why}; run again later, what is done is kept") from error


def _passing(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: the network's, the server's, or a damaged answer."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    network = (DamagedError, httpx2.TransportError, errors.LocalEntryNotFoundError, errors.FileMetadataError)
    return isinstance(error, network) or (type(error) is OSError and error.errno is None)  # a file of the wrong size


def _request(listed: Listing, path: str, **headers: str) -> dict[str, Any]:
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    return {"url": hf_hub_url(listed.model, path, revision=listed.commit), "headers": headers, "timeout": TIMEOUT}


def _range(listed: Listing, path: str, start: int, stop: int, reads: int | None) -> bytes:
    """Bytes `start` to `stop` of a file at the listed commit, from answers that agree with the listing."""
    file = listed.files[path]
    stop = min(stop, file.size)

    def read() -> bytes:
        with get_session().stream("GET", **_request(listed, path, Range=f"bytes={start}-{stop - 1}")) as response:
            hf_raise_for_status(response)
            hops = [hop.headers.get("X-Linked-ETag", "").strip('"') for hop in (*response.history, response)]
            bounds = response.headers.get("Content-Range")
            if bounds != f"bytes {start}-{stop - 1}/{file.size}" or file.content not in hops:
                raise DamagedError(f"{path}: asked for bytes {start}-{stop - 1} of {file}, got {bounds} of {hops}")
            data = response.read()
        if len(data) != stop - start:
            raise DamagedError(f"{path}: {len(data)} bytes of {stop - start}")
        return data

    return _ask(listed.model, listed.revision, read, reads)


@contextmanager
def _files(listed: Listing, paths: Sequence[str], keep: bool) -> Iterator[Path]:
    """A folder with whole files, each checked against its content hash; removed at the end unless `keep`."""
    folder = cache_dir() / "checkpoints" / listed.model.replace("/", "--") / listed.revision.replace("/", "--")
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
            raise OSError(f"{folder}: {lacking:,} bytes needed, {free:,} free; free some or set HEADBOUND_CACHE")
        for path in paths:
            _ask(listed.model, listed.revision, partial(fetch, path))
        try:
            yield folder
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _intact(stream: io.BufferedIOBase, file: File) -> bool:
    with stream:
        return (sha_fileobj(stream).hex() if file.lfs else git_hash(stream.read())) == file.content


def _head_name(listed: Listing, names: Iterable[str]) -> str:
    """The head among a file's tensors, else the embedding that a tied model uses as head."""
    for endings in (HEADS, TIED):
        found = [name for name in names if f".{name}".endswith(tuple(f".{ending}" for ending in endings))]
        untied = endings == TIED and json.loads(small_file(listed, "config.json")).get("tie_word_embeddings") is False
        if len(found) == 1 and not untied:
            return found[0]
    raise ValueError(f"{listed.model} at {listed.revision}: no single head among its tensors; choose another")


def _checked(listed: Listing, weight: Tensor, name: str, fetched: int) -> Head:
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError(f"{listed.model} at {listed.revision}: {name} is no finite matrix; choose another revision")
    return Head(weight, name, fetched, listed)
