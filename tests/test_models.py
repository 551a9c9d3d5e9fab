import json
import pathlib
import re
import subprocess
import sys
import time
from pathlib import Path

import hub
import pytest
import tiny
import tokenizers
import torch
import transformers
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

from headbound import cache, hidden, models


@pytest.fixture
def folder(tmp_path):
    return tiny.save(tmp_path / "model")


@pytest.fixture
def altered(folder):
    """A function that edits the weights of a tiny Llama's folder and returns the folder."""

    def edit(change):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return edit


@pytest.fixture
def no_hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "opt"])
def test_every_architecture_loads_as_it_was_saved(tmp_path, kind, tied):
    where = tiny.save(tmp_path, kind, tied)
    model, tokenizer = models.load(str(where), device="cpu")
    assert not model.training
    original = tiny.network(kind, tied)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), original.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    head = models.head_weight(model, tokenizer)
    assert not head.requires_grad
    assert torch.equal(head, original.get_output_embeddings().weight[: tiny.VOCAB])
    assert models.head_weight(model).shape == (tiny.VOCAB + 7, 16)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert tokenizer.decode(tokenizer(tiny.TEXT)["input_ids"]) == tiny.TEXT


def test_an_encoder_loads_and_has_no_head(tmp_path):
    model, tokenizer = models.load(str(tiny.save(tmp_path, "bert")), device="cpu")
    with pytest.raises(ValueError, match="BertModel has no LM head; use a causal language model"):
        models.head_weight(model, tokenizer)


def test_sharded_weights_load_whole(tmp_path):
    where = tiny.save(tmp_path, max_shard_size="10KB")
    assert len(list(where.glob("*.safetensors"))) > 2
    model, _ = models.load(str(where), device="cpu")
    assert torch.equal(model.lm_head.weight, tiny.network("llama").lm_head.weight)
    next(where.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="its weights can't be read"):
        models.load(str(where))


def test_float32_unless_asked_otherwise(tmp_path):
    tiny.network("llama").half().save_pretrained(tmp_path)
    tiny.fast_tokenizer().save_pretrained(tmp_path)
    assert models.load(str(tmp_path), device="cpu")[0].dtype == torch.float32
    assert models.load(str(tmp_path), dtype=torch.bfloat16, device="cpu")[0].dtype == torch.bfloat16


class Malicious:
    """Creates a file when unpickled by a plain unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_pickled_weights_load_as_tensors_only(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model, _ = models.load(str(folder), device="cpu")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])

    trap = tmp_path / "sprung"
    torch.save({**weights, "evil": Malicious(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"its pickled weights hold more than tensors.*use .safetensors"
    ):
        models.load(str(folder))
    assert not trap.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # the trap does work


def test_a_repositorys_own_code_is_never_run(folder, tmp_path):
    trap = tmp_path / "sprung"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(
        ValueError, match="needs code of its own repository, which is never run here"
    ):
        models.load(str(folder))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "its weights can't be read .*no file named"),
        ("model.safetensors", b"", "its weights can't be read .*header"),
        ("config.json", b"{", "its config can't be read .*not a valid JSON"),
        ("config.json", b'{"model_type": "unheard_of"}', "its config can't be read .*unheard_of"),
        ("tokenizer.json", b"{}", "its tokenizer can't be read"),
    ],
)
def test_broken_files_are_named_in_one_line(folder, file, content, message):
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        models.load(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_told_so(tmp_path):
    """For GPT-NeoX, `transformers` makes up an empty one, that finds no token in any text."""
    tiny.save(tmp_path / "neox", "neox")
    for file in (tmp_path / "neox").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="it has no tokenizer; add its"):
        models.load(str(tmp_path / "neox"))


@pytest.mark.parametrize("lost", [1, 1000])
def test_truncated_weights(folder, lost):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"its weights can't be read .*incomplete"):
        models.load(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing or misshapen tensors \['model.layers.1.mlp",
        ),
        (lambda w: w.pop("lm_head.weight"), r"missing or misshapen tensors \['lm_head.weight'\]"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(17)}),
            r"missing or misshapen tensors \['model.norm",
        ),
        (lambda w: w["model.norm.weight"].fill_(torch.nan), "NaN or Inf in model.norm.weight"),
        (lambda w: w["lm_head.weight"][3].fill_(torch.inf), "NaN or Inf in lm_head.weight"),
    ],
)
def test_altered_weights_are_named(altered, change, message):
    with pytest.raises(ValueError, match=message):
        models.load(altered(change))


def test_weights_that_overflow_in_half_precision(altered):
    where = altered(lambda w: w["lm_head.weight"].fill_(1e5))
    models.load(where, device="cpu")
    with pytest.raises(
        ValueError, match=r"NaN or Inf in lm_head.weight; use intact weights, or load in float32"
    ):
        models.load(where, dtype=torch.float16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nothing-here", "no such folder or .gguf file; give one, a Hub id or smollm2"),
        ("a/b/c", "no such folder"),
        ("nothing-here.gguf", "'nothing-here.gguf': no such folder or .gguf file"),
    ],
)
def test_missing_paths(model, message):
    with pytest.raises(ValueError, match=message):
        models.load(model)


def test_a_gguf_file_is_read_without_a_word(tmp_path, capsys):
    saved = tiny.save_gguf(tmp_path / "llama.gguf")
    network, tokenizer = models.load(str(tmp_path / "llama.gguf"))
    assert torch.equal(models.head_weight(network), models.head_weight(saved))
    assert tokenizer("the quick")["input_ids"] == tiny.fast_tokenizer()("the quick")["input_ids"]
    assert capsys.readouterr() == ("", "")  # a notebook publishes what is said there


def test_a_gguf_file_that_is_none(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF, not really")
    with pytest.raises(ValueError, match=r"x.gguf': its config can't be read"):
        models.load(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("revision", [None, "step1000"])
def test_a_hub_id_without_a_hub_fails_fast(no_hub, revision):
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"model = 'nobody/nothing'.*can't be read .*that the hub is in reach"
    ) as error:
        models.load("nobody/nothing", revision)
    assert time.monotonic() - start < 8  # no chain of retries
    assert "\n" not in str(error.value)
    assert (revision or "nobody") in str(error.value)


def test_a_folder_has_no_revisions(folder):
    with pytest.raises(ValueError, match="revision = 'step1': only a Hub id has revisions"):
        models.load(str(folder), revision="step1")


def test_a_device_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"device = 'abacus': this machine has .*cpu"):
        models.load(str(folder), device="abacus")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A tiny model in an installed package whose own code must never run; an empty cache."""
    site = tmp_path / "site"
    tiny.save(site / "tiny_model")
    (site / "tiny_model" / "__init__.py").write_text("raise SystemExit('run')")
    info = site / "tiny_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(models.WHEELS, "tiny", models._Wheel("tiny-model", "tiny_model"))
    return site


def test_a_model_of_an_installed_package(package):
    model, _ = models.load("tiny", device="cpu")
    assert torch.equal(model.lm_head.weight, tiny.network("llama").lm_head.weight)
    assert models._folder("tiny") == package / "tiny_model"


def test_a_gguf_of_a_package_is_dequantised_once(package, monkeypatch):
    saved = tiny.save_gguf(package / "tiny_model" / "x.gguf")
    wheel = models._Wheel("tiny-model", "tiny_model", "x.gguf")
    monkeypatch.setitem(models.WHEELS, "tiny", wheel)
    model, _ = models.load("tiny", device="cpu")
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    monkeypatch.setattr(models, "_dequantise", lambda *_: pytest.fail("again"))
    assert models._folder("tiny").name.startswith("tiny-")


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(models.WHEELS, "absent", models._Wheel("absent-model", "x"))
    with pytest.raises(ValueError, match=r"absent-model is not installed; run `make install`, or"):
        models.load("absent")


def test_the_lock_pins_every_wheel():
    lock = (Path(models.__file__).parents[2] / "models.lock").read_text(encoding="utf-8")
    pinned = re.findall(r"^(\S+)==\S+ --hash=sha256:[0-9a-f]{64}$", lock, re.MULTILINE)
    assert pinned == [models.WHEELS[name].package for name in ("smollm2-135m", "minilm-l6-v2")]


def test_an_unusable_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        OSError, match=r"writing .*cache: Not a directory; .*set HEADBOUND_CACHE to"
    ):
        models.load("smollm2-135m")


def test_the_cache_folder_may_be_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HEADBOUND_CACHE", "~/kept")
    assert cache.cache_dir() == tmp_path / "kept"


def test_a_model_may_be_below_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert models.load("~/model", device="cpu")[0].dtype == torch.float32


def test_one_file_of_a_model_is_not_the_model(folder):
    with pytest.raises(ValueError, match=r"no such folder or \.gguf file; give one"):
        models.load(str(folder / "model.safetensors"))


@pytest.fixture
def served(monkeypatch, tmp_path, folder):
    """A hub on this machine with an open model and a gated one, whose page is public."""
    handler = hub.Handler

    class PublicPages(handler):
        def route(self, path, query):
            gated = self.hub.gated
            self.hub.gated = set() if path.startswith("/api/") else gated
            try:
                return super().route(path, query)
            finally:
                self.hub.gated = gated

    monkeypatch.setattr(hub, "Handler", PublicPages)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub.Hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for name in ("org/gated", "org/open"):
            server.commit(name, "main", {file.name: file.read_bytes() for file in folder.iterdir()})
        server.gated.add("org/gated")
        yield server
    close_session()


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("org/gated", None, r"gated.*HF_TOKEN"),
        ("org/nowhere", None, "RepositoryNotFoundError.*check its name"),
        (
            "org/open",
            "step9",
            "revision = 'step9': .*RevisionNotFoundError.*check its name and revision",
        ),
    ],
)
def test_what_a_hub_refuses_is_said_in_one_line(served, model, revision, message):
    with pytest.raises(ValueError, match=message) as error:
        models.load(model, revision)
    assert "\n" not in str(error.value)
    assert model in str(error.value)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_named_with_the_fix(folder, alone):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if alone:
        (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="it has an adapter; merge it into its base model"):
        models.load(str(folder))


def test_a_text_model_inside_a_multimodal_one_is_loaded(tmp_path):
    text = tiny.ROTARY | {"num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    made = transformers.Gemma3ForConditionalGeneration(config)
    made.save_pretrained(tmp_path)
    tiny.fast_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = models.load(str(tmp_path), device="cpu")
    assert torch.equal(models.head_weight(model), made.get_output_embeddings().weight)
    ids = torch.randint(tiny.VOCAB, (2, 9))
    assert abs(models.readout(model, tokenizer, ids).gap) < 1e-4
    assert len(hidden.layer_names(model)) == 5
    with torch.inference_mode():
        theirs = model(ids, output_hidden_states=True).hidden_states
    ours = next(hidden.stream(model, ids))
    torch.testing.assert_close(ours[:3], torch.stack(theirs[:3]))
    torch.testing.assert_close(ours[4], theirs[-1])


def test_rows_are_kept_up_to_the_highest_id():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"</s>": 256, "THE": 270}
    made = Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.add_special_tokens(["</s>", "THE"])
    holes = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    assert len(holes) < 271
    assert models.head_weight(tiny.network("llama"), holes).shape == (271, 16)


def test_what_decides_a_key():
    model, words = tiny.network("llama"), tiny.fast_tokenizer()
    keys = [models.key(model), models.key(model, words)]
    assert models.key(tiny.network("llama"), tiny.fast_tokenizer()) == keys[1]
    keys.append(models.key(model, tiny.starting_tokenizer()))
    keys.append(models.key(tiny.network("llama", seed=1), words))
    keys.append(models.key(tiny.network("llama").bfloat16(), words))
    changed = tiny.network("llama")
    changed.config.rms_norm_eps = 0.5
    keys.append(models.key(changed, words))
    assert len(set(keys)) == len(keys)


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2-135m", device="cpu")


def test_the_books_model(smollm2):
    model, tokenizer = smollm2
    head = models.head_weight(model, tokenizer)
    assert head.shape == (49_152, 576)
    assert head.dtype == torch.float32
    assert head.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # tied
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


def test_the_books_encoder():
    model, tokenizer = models.load("minilm-l6-v2", device="cpu")
    assert model.config.hidden_size == 384
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings


def test_what_papermill_read_as_a_number_is_refused():
    """In a process of its own, for in tests the types of arguments are checked by others."""
    program = """
from headbound import models
for asked in [(160, None), ("a/b", 12345e6)]:
    try:
        models.load(*asked)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "model = 160: must be text; with papermill give it by -r",
        "revision = 12345000000.0: must be text; with papermill give it by -r",
    ], done.stderr
