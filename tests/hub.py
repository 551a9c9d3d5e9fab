"""A Hugging Face Hub on loopback, over tiny checkpoints in Pythia's layout, with faults on demand.

`with Hub() as hub:` serves; point the real clients at it with `HF_ENDPOINT=hub.url`. As a program,
`python tests/hub.py --faults 0.33` serves the planted suite of `pythia_suite` until interrupted.
"""

import argparse
import hashlib
import io
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import tiny
import torch
from safetensors.torch import save
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

KINDS = ("cut", "short", "429", "503", "wrong")
LFS = (".safetensors", ".bin")
STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


class Answer(NamedTuple):
    """One answer given: what was asked, how it ended, and how many bytes of body went out."""

    method: str
    path: str
    status: int
    sent: int
    fault: str | None


def blob_id(data: bytes) -> str:
    """Git's name of a file's content, which the Hub gives as the ETag of what is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Repositories in memory behind a threaded HTTP server on 127.0.0.1."""

    def __init__(self, page: int = 1000) -> None:
        self.page = page  # entries a page of a tree listing
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.open_pages = False  # a gated model's page is public, and only its files are not
        self.content: dict[str, bytes] = {}
        self.answers: list[Answer] = []
        self.lock = threading.Lock()
        self.script: Iterator[str | None] = itertools.repeat(None)
        bound = type("Bound", (Handler,), {"hub": self})
        # The real Hub redirects large files to another host: here another port.
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), bound) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self) -> "Hub":
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def commit(self, model: str, branch: str, files: Mapping[str, bytes]) -> str:
        """Make `files` the whole content of a branch; the commit's hash."""
        listing = "".join(f"{path}{blob_id(data)}" for path, data in sorted(files.items()))
        sha = hashlib.sha1(f"{model}{branch}{listing}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches.setdefault(model, {})[branch] = sha
        for path, data in files.items():
            if path.endswith(LFS):
                self.content[hashlib.sha256(data).hexdigest()] = data
        return sha

    def fail(self, kinds: Iterable[str | None]) -> None:
        """Give the next answers these faults, one each (None: a good one), then none any more."""
        self.script = itertools.chain(kinds, itertools.repeat(None))

    def fail_often(self, rate: float, kinds: Iterable[str] = KINDS, seed: int = 0) -> None:
        """From now on, give each answer a fault with probability `rate`, drawn from `kinds`."""
        rng, kinds = random.Random(seed), list(kinds)
        self.script = (
            rng.choice(kinds) if rng.random() < rate else None for _ in itertools.count()
        )

    @property
    def sent(self) -> int:
        """Bytes of body served so far."""
        return sum(answer.sent for answer in self.answers)


class Handler(BaseHTTPRequestHandler):
    """The Hub's interface as far as huggingface_hub uses it; connections are kept alive."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Stay silent: `hub.answers` is the log."""

    def handle(self) -> None:
        """A client that was killed is no error of the server's."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """A page, a file, or a range of one."""
        with self.hub.lock:
            fault = next(self.hub.script)
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if fault in ("429", "503"):
            return self.reply(int(fault), b"", {}, fault)
        try:
            status, body, headers = self.route(path, query)
        except KeyError as missing:
            code = str(missing.args[0])
            status, body = (
                (403 if code == "GatedRepo" else 401 if code == "RepoNotFound" else 404),
                b"",
            )
            headers = {"X-Error-Code": code, "X-Error-Message": code}
        return self.reply(status, body, headers, fault)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def route(self, path: str, query: dict[str, list[str]]) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers; KeyError with the Hub's error code where there is nothing."""
        if path.startswith("/cdn/"):
            data = self.hub.content[path.removeprefix("/cdn/")]
            return (
                200,
                data,
                {"ETag": f'"{hashlib.md5(data).hexdigest()}-1"', "Accept-Ranges": "bytes"},
            )
        self.api = path.startswith("/api/")
        if match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(tree|paths-info)/(.+?)(?:/(.+))?", path
        ):
            return self.tree(*match.groups(), query)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            branches = self.repository(match[1])
            rows = [
                {"name": k, "ref": f"refs/heads/{k}", "targetCommit": v}
                for k, v in branches.items()
            ]
            return self.json({"branches": rows, "converts": [], "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            sha, files = self.files(match[1], match[2] or "main")
            rows: list[dict[str, Any]] = [{"rfilename": name} for name in files]
            if "blobs" in query:
                rows = [sibling(name, data) for name, data in files.items()]
            info = {
                "id": match[1],
                "modelId": match[1],
                "sha": sha,
                "siblings": rows,
                "tags": [],
                "downloads": 0,
            }
            return self.json(
                {**info, "private": False, "gated": False, "disabled": False, "likes": 0}
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        raise KeyError("EntryNotFound")

    def repository(self, model: str) -> dict[str, str]:
        """A model's branches."""
        if model in self.hub.gated and not (self.api and self.hub.open_pages):
            raise KeyError("GatedRepo")
        if model not in self.hub.branches:
            raise KeyError("RepoNotFound")
        return self.hub.branches[model]

    def files(self, model: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """A revision's commit and files; any commit stays readable after its branch moved on."""
        branches = self.repository(model)
        sha = branches.get(revision, revision)
        if sha not in self.hub.commits:
            raise KeyError("RevisionNotFound")
        return sha, self.hub.commits[sha]

    def tree(
        self, model: str, kind: str, revision: str, folder: str | None, query: dict[str, list[str]]
    ) -> Any:
        """A listing with hashes, in pages (`tree`) or of chosen paths (`paths-info`)."""
        files = self.files(model, revision)[1]
        if kind == "paths-info":
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            files = {path: data for path, data in files.items() if path in form.get("paths", [])}
        rows = [entry(path, data) for path, data in files.items()]
        start = int(query.get("cursor", ["0"])[0])
        status, body, headers = self.json(rows[start : start + self.hub.page])
        if start + self.hub.page < len(rows):
            url = (
                f"{self.hub.url}/api/models/{model}/tree/{revision}?cursor={start + self.hub.page}"
            )
            headers["Link"] = f'<{url}>; rel="next"'
        return status, body, headers

    def resolve(self, model: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        """A file: a small one at once, one in LFS by a redirect that names its sha256 and size."""
        sha, files = self.files(model, revision)
        if path not in files:
            raise KeyError("EntryNotFound")
        data = files[path]
        if not path.endswith(LFS):
            return (
                200,
                data,
                {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"},
            )
        oid = hashlib.sha256(data).hexdigest()
        linked = {
            "X-Linked-ETag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": sha,
        }
        return 302, b"", {"Location": f"{self.hub.cdn}/cdn/{oid}", **linked}

    def json(self, value: object) -> tuple[int, bytes, dict[str, str]]:
        """A JSON answer."""
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}

    def reply(self, status: int, body: bytes, headers: dict[str, str], fault: str | None) -> None:
        """Send an answer, the asked range of it, spoilt as `fault` says."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200:
            start, stop = int(asked[1]), min(int(asked[2] or len(body) - 1) + 1, len(body))
            if fault == "short" and stop - start > 1:
                stop = (start + stop) // 2
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
            status, body = 206, body[start:stop]
        if fault == "wrong" and body:
            spot = random.randrange(len(body))
            body = body[:spot] + bytes([body[spot] ^ 1]) + body[spot + 1 :]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body[: len(body) // 2] if fault == "cut" else body
        with self.hub.lock:
            self.hub.answers.append(Answer(self.command, self.path, status, len(sent), fault))
        self.wfile.write(sent)
        if fault == "cut":
            self.close_connection = True


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file's row in a tree listing; git's blob of a file in LFS is its pointer's."""
    row = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if path.endswith(LFS):
        oid = hashlib.sha256(data).hexdigest()
        row["oid"] = blob_id(oid.encode())
        row["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
    return row


def sibling(path: str, data: bytes) -> dict[str, Any]:
    """The same as a model's own page has it: other names, for the same things."""
    row = entry(path, data)
    lfs = row.get("lfs")
    renamed = (
        {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}} if lfs else {}
    )
    return {"rfilename": path, "size": row["size"], "blobId": row["oid"], **renamed}


def tokenizer_files(real: int) -> dict[str, bytes]:
    """A byte-level BPE of `real` tokens in Pythia's files, trained on made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(4 * real)]
    texts = (" ".join(words[i : i + 20]) for i in range(0, len(words), 20))
    tokenizer = tiny.tokenizer(texts, real)
    assert tokenizer.get_vocab_size() == real
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **end,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "special_tokens_map.json": json.dumps(end).encode(),
    }


def shape(width: int, rows: int, layers: int) -> dict[str, Any]:
    """A GPT-NeoX configuration in miniature."""
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 16),
        "intermediate_size": 4 * width,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }


def checkpoint(
    width: int, rows: int, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float16
) -> Any:
    """Config and tensors of a random GPT-NeoX model under the names of Pythia's files."""
    config = GPTNeoXConfig(**shape(width, rows, layers))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = GPTNeoXForCausalLM(config).state_dict()
    tensors = {
        name.replace("lm_head.", "embed_out."): tensor.to(dtype).contiguous()
        for name, tensor in state.items()
    }
    text = {**config.to_dict(), "architectures": ["GPTNeoXForCausalLM"], "torch_dtype": "float16"}
    return {"config.json": json.dumps(text, indent=1, sort_keys=True).encode()}, tensors


def weights(
    tensors: Mapping[str, torch.Tensor], shards: int = 1, kind: str = "safetensors"
) -> dict[str, bytes]:
    """The weight files: one, or several with the index that says which tensor is where."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if shards == 1:
        return {f"{stem}.{kind}": pack(tensors, kind)}
    names = sorted(tensors)
    parts = [dict.fromkeys(names[i::shards]) for i in range(shards)]
    paths = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}" for i in range(shards)]
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {
            name: path for path, part in zip(paths, parts, strict=True) for name in part
        },
    }
    files = {
        path: pack({n: tensors[n] for n in part}, kind)
        for path, part in zip(paths, parts, strict=True)
    }
    return {**files, f"{stem}.{kind}.index.json": json.dumps(index).encode()}


def pack(tensors: Mapping[str, torch.Tensor], kind: str) -> bytes:
    """One weight file's bytes."""
    if kind == "safetensors":
        return save(dict(tensors), {"format": "pt"})
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def pythia_suite(
    hub: Hub,
    widths: Mapping[str, int] = {"pythia-14m": 32, "pythia-31m": 64, "pythia-70m": 128},
    steps: Iterable[int] = STEPS,
    rows: int = 2048,
    real: int = 2000,
) -> dict[str, list[str]]:
    """Fill a hub with EleutherAI models, a branch `step{N}` a checkpoint, `main` like the last.

    The first model is one file, the second sharded, the third `.bin` at first and then one file.
    """
    files = tokenizer_files(real)
    for order, (name, width) in enumerate(widths.items()):
        for n, step in enumerate(steps):
            config, tensors = checkpoint(width, rows, seed=1000 * order + n)
            kind = "bin" if order == 2 and n == 0 else "safetensors"
            saved = {
                **config,
                **files,
                **weights(tensors, shards=2 if order == 1 else 1, kind=kind),
            }
            hub.commit(f"EleutherAI/{name}", f"step{step}", saved)
        hub.commit(f"EleutherAI/{name}", "main", saved)
    return {f"EleutherAI/{name}": [f"step{step}" for step in steps] for name in widths}


def hurry(monkeypatch: Any) -> None:
    """Make huggingface_hub's own pauses between two tries short."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


@contextmanager
def serving(faults: float = 0.0, **suite: Any) -> Iterator[Hub]:
    """A hub with the suite in it, failing at a rate."""
    with Hub() as hub:
        pythia_suite(hub, **suite)
        if faults:
            hub.fail_often(faults)
        yield hub


def main() -> None:
    """Serve the suite until interrupted; the first line printed is the address."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--faults", type=float, default=0.0, help="share of the answers that fail")
    with serving(parser.parse_args().faults) as hub:
        print(hub.url, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
