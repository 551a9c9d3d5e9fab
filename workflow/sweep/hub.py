"""The Hub, read with distrust: each answer is checked, and asked for again if it is not good.

A whole file is checked against the hash that the Hub lists. A range of a file has no hash: it is
read only over https, which vouches for its bytes. Over plain http the whole file is fetched.
"""

import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, TypeVar

import httpx2
import tenacity
import torch
from filelock import FileLock
from huggingface_hub import HfApi, HfFileSystem, constants, errors
from huggingface_hub.utils import disable_progress_bars
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from headbound.cache import cache_dir, replacing

disable_progress_bars()  # a notebook's outputs are published

Answer = TypeVar("Answer")
FORMATS = {"safetensors": "model", "bin": "pytorch_model"}  # the one to read first comes first
HEADS = ("embed_out.weight", "lm_head.weight")
TIED = ("embed_in.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight")
TRIES = 8
WAIT = float(os.environ.get("HEADBOUND_WAIT", "1"))  # seconds; doubles up to a minute
TOLD = 4  # seconds: a pause from which on the reader is told


class DamagedError(OSError):
    """An answer that contradicts itself or another one."""


ABSENT = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
LOST = (httpx2.TransportError, errors.FileMetadataError, FileNotFoundError)
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, errors.SafetensorsParsingError)


class File(NamedTuple):
    """A file as the Hub lists it: bytes, and the SHA-256 of its content (or git's blob id)."""

    size: int
    content: str


class Listing(NamedTuple):
    """What a revision held at one moment. All else is read at its commit, which can't change."""

    model: str
    revision: str
    commit: str
    files: dict[str, File]

    def weights(self) -> dict[str, dict[str, File]]:
        """The weight files of each format that is there, the one to read first."""
        found: dict[str, dict[str, File]] = {}
        for kind, stem in FORMATS.items():
            for path, file in self.files.items():
                if path.startswith(stem) and path.endswith(f".{kind}"):
                    found.setdefault(kind, {})[path] = file
        return found


class Head(NamedTuple):
    """A head as stored, padding rows included, and the revision that it was read from."""

    weight: Float[Tensor, "rows d"]
    listed: Listing


def listing(model: str, revision: str = "main", tries: int | None = None) -> Listing:
    """A revision's files with their hashes. The model's page and its commit's tree must agree.

    **Raises:** `FileNotFoundError` or `PermissionError` for a model or revision that is missing,
    private or gated; `ConnectionError` if the Hub gave no good answer in `tries` (or `TRIES`).
    """
    api = HfApi()

    def read() -> Listing:
        info = api.model_info(model, revision=revision, files_metadata=True)
        files = {each.rfilename: _file(each) for each in info.siblings}
        try:
            tree = list(api.list_repo_tree(model, revision=info.sha, recursive=True))
        except errors.RevisionNotFoundError as error:
            raise DamagedError(f"the commit {info.sha} is listed and not there") from error
        if files != {each.path: _file(each) for each in tree if hasattr(each, "blob_id")}:
            raise DamagedError("two listings of one commit differ")
        return Listing(model, revision, info.sha, files)

    return _asked(model, revision, read, tries)


def small_file(listed: Listing, path: str) -> bytes:
    """A small file's content, kept in the cache under its hash, as revisions share most of them.

    **Raises:** `FileNotFoundError` if the revision does not have it; as `listing`.
    """
    if path not in listed.files:
        where = f"revision = {listed.revision!r}: {listed.model}"
        raise FileNotFoundError(f"{where} has no {path} there; choose another")
    kept = cache_dir() / "hub" / listed.files[path].content
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            _download(listed, [path], Path(scratch))
            with replacing(kept) as temporary:
                shutil.copy(Path(scratch, path), temporary)
    return kept.read_bytes()


def tokenizer(listed: Listing) -> Tokenizer:
    """A checkpoint's tokenizer, from its `tokenizer.json`."""
    return Tokenizer.from_buffer(small_file(listed, "tokenizer.json"))


@contextmanager
def local(model: str, revision: str = "main", keep: bool = False) -> Iterator[tuple[Path, Listing]]:
    """A whole checkpoint in a folder, each file checked; removed after, unless `keep`.

    **Raises:** as `listing`; `ValueError` for code of its own; `OSError` on a full disk.
    """
    listed = listing(model, revision)
    config = json.loads(small_file(listed, "config.json"))
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING_NAMES:
        why = "it needs code of its own, which is never run; choose another model"
        raise ValueError(f"model = {model!r}: {why}")
    kinds = (".json", ".txt", ".model")
    texts = [path for path in listed.files if "/" not in path and path.endswith(kinds)]
    weights = next(iter(listed.weights().values()), {})
    with _files(listed, [*texts, *weights], keep) as folder:
        yield folder, listed


def head(model: str, revision: str = "main", keep: bool = False, tries: int = 0) -> Head:
    """A checkpoint's head alone: over https its own bytes, otherwise out of the file it is in.

    **Raises:** as `listing`; `ValueError` for a checkpoint without a head, or with a NaN in it.
    """
    listed = listing(model, revision, tries)
    kind = next(iter(listed.weights()), None)
    if kind is None:
        where = f"revision = {revision!r}: {model}"
        raise ValueError(f"{where} has no .safetensors or .bin there; choose another")
    path = f"{FORMATS[kind]}.{kind}"
    if path not in listed.files:
        where = json.loads(small_file(listed, f"{path}.index.json"))["weight_map"]
        path = where[_head_name(listed, where)]
    if kind == "safetensors" and authenticated():
        name, weight = _ranged_head(listed, path)
    else:
        name, weight = _whole_head(listed, path, keep)
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.isfinite().all():
        why = f"{name} is no finite matrix; choose another revision"
        raise ValueError(f"{model} at {revision}: {why}")
    return Head(weight, listed)


def authenticated() -> bool:
    """Whether the transport itself vouches for the bytes it carries."""
    return constants.ENDPOINT.startswith("https://")


def _ranged_head(listed: Listing, path: str) -> tuple[str, Tensor]:
    api = HfApi()
    system = HfFileSystem(skip_instance_cache=True)
    where = {"revision": listed.commit}
    told = partial(api.parse_safetensors_file_metadata, listed.model, path, **where)
    header = _asked(listed.model, listed.revision, told).tensors
    name = _head_name(listed, header)
    info = header[name]
    begin, end = info.data_offsets
    length = end - begin
    last = max(each.data_offsets[1] for each in header.values())  # where the file ends
    start = listed.files[path].size - last + begin

    def read() -> bytes:
        part = {"start": start, "end": start + length, "cache_type": "none"}
        data = system.cat_file(f"{listed.model}/{path}", **part, **where)
        if len(data) != length:
            raise DamagedError(f"{path}: {len(data)} bytes of {length}")
        return data

    data = _asked(listed.model, listed.revision, read)
    # A file of this one tensor, for the library to read.
    entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [0, length]}
    alone = json.dumps({name: entry}).encode()
    return name, load(len(alone).to_bytes(8, "little") + alone + data)[name]


def _whole_head(listed: Listing, path: str, keep: bool) -> tuple[str, Tensor]:
    with _files(listed, [path], keep) as folder:
        if path.endswith(".safetensors"):
            with safe_open(folder / path, "pt") as stored:
                name = _head_name(listed, stored.keys())
                return name, stored.get_tensor(name)
        try:
            state = torch.load(folder / path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            where = f"{listed.model} at {listed.revision}: {path}"
            raise ValueError(f"{where} holds more than weights; not loaded") from error
        name = _head_name(listed, state)
        return name, state[name].clone()


def _head_name(listed: Listing, names: Iterable[str]) -> str:
    """The head among a file's tensors, else the embedding that a tied model uses as head."""
    names = list(names)
    found = [name for name in names if name.endswith(HEADS)]
    if not found:
        config = json.loads(small_file(listed, "config.json"))
        if config.get("tie_word_embeddings") is not False:
            found = [name for name in names if name.endswith(TIED)]
    if len(found) != 1:
        where = f"{listed.model} at {listed.revision}"
        raise ValueError(f"{where}: no single head among its tensors; choose another")
    return found[0]


@contextmanager
def _files(listed: Listing, paths: Sequence[str], keep: bool) -> Iterator[Path]:
    names = [name.replace("/", "--") for name in (listed.model, listed.revision)]
    folder = cache_dir().joinpath("checkpoints", *names)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        lacking = sum(listed.files[path].size for path in paths if not (folder / path).exists())
        free = shutil.disk_usage(folder).free
        if free < lacking:
            need = f"{lacking:,} bytes needed, {free:,} free"
            raise OSError(f"{folder}: {need}; free some or set HEADBOUND_CACHE")
        _download(listed, paths, folder)
        try:
            yield folder
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _download(listed: Listing, paths: Sequence[str], folder: Path) -> None:
    api = HfApi()
    where = {"revision": listed.commit, "local_dir": folder}
    wanted = {"allow_patterns": [glob.escape(path) for path in paths]}

    def fetch() -> None:
        try:
            api.snapshot_download(listed.model, **where, **wanted)
            checked = api.verify_repo_checksums(listed.model, **where)
        except errors.GatedRepoError:
            raise
        except ABSENT as error:
            raise DamagedError(f"what was listed is not there ({error})") from error
        wrong = {each["path"] for each in checked.mismatches}
        for path in wrong:
            (folder / path).unlink()
        bad = sorted(set(paths) & {*wrong, *checked.missing_paths})
        if bad:
            raise DamagedError(f"not what the Hub lists: {', '.join(bad)}")

    _asked(listed.model, listed.revision, fetch)


def _asked(
    model: str, revision: str, read: Callable[[], Answer], tries: int | None = None
) -> Answer:
    """An answer, asked for with growing pauses; what is final as one clear line."""
    retry = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(tries or TRIES),
        wait=tenacity.wait_exponential(WAIT, max=60),
        retry=tenacity.retry_if_exception(_passing),
        before_sleep=_tell,
        reraise=True,
    )
    what = f"model = {model!r}"
    try:
        return retry(read)
    except errors.GatedRepoError as error:
        fix = "gated; accept its terms on the Hub and set HF_TOKEN"
        raise PermissionError(f"{what}: {fix}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        fix = "not on the Hub, or private; check it or set HF_TOKEN"
        raise FileNotFoundError(f"{what}: {fix}") from error
    except errors.RevisionNotFoundError as error:
        lack = f"{model} has none of that name on the Hub"
        raise FileNotFoundError(f"revision = {revision!r}: {lack}") from error
    except Exception as error:
        if not _passing(error) and not isinstance(error, errors.OfflineModeIsEnabled):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        fix = "run again later, what is done is kept"
        raise ConnectionError(f"{model} at {revision}: {why}; {fix}") from error


def _tell(state: tenacity.RetryCallState) -> None:
    if state.upcoming_sleep >= TOLD:
        error = state.outcome.exception()
        reason = " ".join(str(error).split())
        pause = f"asked again in {state.upcoming_sleep:.0f} s, {state.attempt_number} of {TRIES}"
        print(f"headbound: {reason}: {pause}", file=sys.stderr, flush=True)


def _passing(error: BaseException) -> bool:
    """Whether an error may be gone next time: the network's, the server's, a damaged answer's."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, errors.HFValidationError | PermissionError):
        return False
    if type(error) is OSError:  # a file of the wrong size has no number, a full disk has one
        return error.errno is None
    return isinstance(error, (DamagedError, *LOST, *UNREADABLE))


def _file(entry) -> File:
    return File(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
