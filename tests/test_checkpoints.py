"""Reading heads and auditing revisions against the loopback hub, whole and faulty."""

import hashlib
import json
import math
import pickle
import shutil

import hub
import pytest
import torch
from huggingface_hub import close_session, constants
from sweep import hub as reader
from sweep.audit import audit

ROWS, WIDTH = 2048, 96
TOKENIZER = hub.tokenizer_files(300)


@pytest.fixture
def served(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reader, "WAIT", 0.01)
    hub.hurry(monkeypatch)
    with hub.Hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server
    close_session()


def put(
    server, branch, seed=0, shards=1, kinds=("safetensors",), model="a/m", change=None, **config
):
    """One tiny checkpoint on the hub; its tensors."""
    files, tensors = hub.checkpoint(WIDTH, ROWS, layers=1, seed=seed)
    if config:
        files = {"config.json": json.dumps({**json.loads(files["config.json"]), **config}).encode()}
    tensors = change(tensors) if change else tensors
    for kind in kinds:
        files |= hub.weights(tensors, shards, kind)
    server.commit(model, branch, {**files, **TOKENIZER})
    return tensors


@pytest.fixture
def ranged(monkeypatch):
    """Read ranges of files although the hub is not on https."""
    monkeypatch.setattr(reader, "authenticated", lambda: True)


@pytest.mark.parametrize("over_https", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_head_is_the_stored_one_whatever_the_files(
    served, kind, shards, over_https, tmp_path, monkeypatch
):
    monkeypatch.setattr(reader, "authenticated", lambda: over_https)
    tensors = put(served, "step1", shards=shards, kinds=[kind])
    head = reader.head("a/m", "step1")
    assert torch.equal(head.weight, tensors["embed_out.weight"])
    assert head.weight.dtype == torch.float16
    assert not list((tmp_path / "cache" / "checkpoints").rglob("*.bin"))


@pytest.mark.parametrize("over_https", [False, True])
def test_a_tied_models_head_is_its_embedding(served, over_https, monkeypatch):
    monkeypatch.setattr(reader, "authenticated", lambda: over_https)

    def tie(tensors):
        return {n: t for n, t in tensors.items() if n != "embed_out.weight"}

    tensors = put(served, "main", change=tie, tie_word_embeddings=True)
    assert torch.equal(reader.head("a/m").weight, tensors["gpt_neox.embed_in.weight"])
    put(served, "untied", change=tie)
    with pytest.raises(ValueError, match="no single head"):
        reader.head("a/m", "untied")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_stored_type_is_read_exactly(served, dtype):
    tensors = put(served, "main", change=lambda t: {n: x.to(dtype) for n, x in t.items()})
    assert torch.equal(reader.head("a/m").weight, tensors["embed_out.weight"])


def test_a_head_costs_its_own_bytes_over_https(served, ranged):
    put(served, "main", shards=2)
    before = served.sent
    reader.head("a/m")
    assert served.sent - before < 1.1 * ROWS * WIDTH * 2 + 110_000  # and at most this of the header


def test_over_plain_http_a_head_comes_from_a_whole_file_that_is_hashed(served):
    put(served, "main")
    before = served.sent
    reader.head("a/m")
    size = reader.listing("a/m").files["model.safetensors"].size
    assert served.sent - before > size


FAULTS = [(kind, False) for kind in hub.KINDS]
FAULTS += [(kind, True) for kind in hub.KINDS if kind != "wrong"]  # a range has no hash


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "over_https"), FAULTS)
def test_a_fault_anywhere_changes_nothing(served, monkeypatch, kind, over_https):
    monkeypatch.setattr(reader, "authenticated", lambda: over_https)
    tensors = put(served, "main")
    for place in range(8):
        served.fail([None] * place + [kind] * 2)
        assert torch.equal(reader.head("a/m").weight, tensors["embed_out.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_third_of_the_answers_failing_changes_nothing(served, kind):
    tensors = put(served, "main", shards=2, kinds=[kind])
    for seed in range(10 if kind == "safetensors" else 1):
        served.fail_often(1 / 3, seed=seed)
        assert torch.equal(reader.head("a/m").weight, tensors["embed_out.weight"])


def test_a_hub_that_never_answers_well_is_named(served, monkeypatch):
    put(served, "main")
    monkeypatch.setattr(reader, "TRIES", 3)
    for kind in ("429", "503", "cut", "wrong"):
        served.fail_often(1, [kind])
        with pytest.raises(ConnectionError, match=r"a/m at main: .*run again later"):
            reader.head("a/m")


def test_whole_checkpoints_are_checked_and_removed(served):
    put(served, "main", kinds=["safetensors", "bin"], shards=2)
    served.fail([None, None, "wrong", None, "wrong"])
    with reader.local("a/m") as (folder, listed):
        for path, file in listed.files.items():
            if path.endswith(".safetensors"):
                assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == file.content
        assert not list(folder.glob("*.bin"))
    assert not folder.exists()
    with reader.local("a/m", keep=True) as (folder, _):
        pass
    before = served.sent
    with reader.local("a/m", keep=True) as (kept, _):
        assert kept == folder
    assert served.sent - before < 10_000


def test_a_branch_that_moves_is_read_at_one_commit(served, monkeypatch):
    old = put(served, "main", seed=1)
    listing = reader.listing

    def moving(*arguments):
        listed = listing(*arguments)
        put(served, "main", seed=2)
        return listed

    monkeypatch.setattr(reader, "listing", moving)
    assert torch.equal(reader.head("a/m").weight, old["embed_out.weight"])


def test_what_cannot_be_read_is_said_in_one_line(served, monkeypatch):
    put(served, "main")
    put(served, "nan", change=lambda t: {**t, "embed_out.weight": t["embed_out.weight"] * math.nan})
    put(served, "int8", change=lambda t: {n: x.to(torch.int8) for n, x in t.items()})
    served.commit("a/m", "empty", TOKENIZER)
    served.commit(
        "a/m",
        "pickle",
        {"pytorch_model.bin": pickle.dumps({"embed_out.weight": print}, 2), **TOKENIZER},
    )
    put(served, "main", model="a/code", auto_map={"AutoModel": "code.Model"}, model_type="mine")
    served.gated.add("a/secret")
    cases = [
        ("a/m", "step9", FileNotFoundError, "revision = 'step9': a/m has none"),
        ("a/none", "main", FileNotFoundError, "model = 'a/none': not on the Hub"),
        ("not a name", "main", FileNotFoundError, "model = 'not a name'"),
        ("a/secret", "main", PermissionError, "model = 'a/secret': gated"),
        ("a/m", "nan", ValueError, "a/m at nan: embed_out.weight is no finite matrix"),
        ("a/m", "int8", ValueError, "no finite matrix"),
        ("a/m", "empty", ValueError, "revision = 'empty': a/m has no"),
        ("a/m", "pickle", ValueError, "holds more than weights"),
    ]
    for model, revision, error, line in cases:
        with pytest.raises(error, match=line) as raised:
            reader.head(model, revision)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="code of its own"), reader.local("a/code"):
        pass
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(reader.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="10,000 free"), reader.local("a/m"):
        pass


def test_a_gated_model_with_a_public_page_is_named(served):
    put(served, "main", model="a/secret")
    served.gated.add("a/secret")
    served.open_pages = True
    with pytest.raises(PermissionError, match="model = 'a/secret': gated"):
        reader.head("a/secret")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kinds", [["safetensors"], ["bin"], ["safetensors", "bin"]])
def test_the_audit_finds_what_was_planted_and_nothing_else(served, shards, kinds):
    steps = [f"step{n}" for n in (0, 1, 2, 4, 8, 16, 32, 64)]
    for n, step in enumerate(steps):
        put(served, step, seed=n, shards=shards, kinds=kinds)
    branches = served.branches["a/m"]
    branches["main"] = branches["step64"]
    before = served.sent
    clean = audit("a/m", steps)
    assert set(clean.status) == {"ok"}
    assert served.sent - before < 100_000
    branches["step1"] = branches["step0"]
    branches["step8"] = branches["step64"]
    expected = dict.fromkeys(steps, "ok") | {
        "step0": "identical",
        "step1": "identical",
        "step8": "identical",
    }
    if shards > 1:
        files = dict(served.commits[branches["step4"]])
        final = served.commits[branches["step64"]]
        shard = next(p for p in files if "00002-of" in p)
        served.commit("a/m", "step4", {**files, shard: final[shard]})
        expected["step4"] = "suspicious"
        files, other = (
            dict(served.commits[branches["step16"]]),
            dict(served.commits[branches["step16"]]),
        )
        second = shard.replace("00002-of", "00003-of")
        served.commit("a/m", "step16", {**files, shard: other[second], second: other[shard]})
        expected["step16"] = "suspicious"
    del branches["step32"]
    expected["step32"] = "missing"
    found = audit("a/m", steps)
    assert dict(zip(found.revision, found.status, strict=True)) == expected
    detail = dict(zip(found.revision, found.detail, strict=True))
    assert detail["step0"] == "step1"
    assert detail["step8"] == "step64"
