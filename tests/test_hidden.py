import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from headbound import hidden

HERE = Path(__file__).parent
KINDS = ["gpt2", "neox", "llama", "opt"]
NORMS = {
    "gpt2": "transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
    "opt": "model.decoder.final_layer_norm",
}


def token_ids(texts=5, length=7, seed=0):
    return torch.randint(
        0, tiny.VOCAB, (texts, length), generator=torch.Generator().manual_seed(seed)
    )


def gathered(model, ids, **options):
    return torch.cat(list(hidden.stream(model, ids, **options)), dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_the_models_own_with_the_norm_told_apart(kind, monkeypatch):
    monkeypatch.setattr(hidden, "BATCH", 2)
    model, ids = tiny.network(kind), token_ids()
    ours = gathered(model, ids)
    assert hidden.layer_names(model) == [
        "embeddings",
        "block 1",
        "block 2",
        "block 3",
        "final norm",
    ]
    assert ours.shape == (5, 5, 7, 16)
    with torch.inference_mode():
        theirs = model(ids, output_hidden_states=True).hidden_states
        for mine, reference in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(mine, reference)
        torch.testing.assert_close(ours[4], theirs[-1])
        norm = model.get_submodule(NORMS[kind])
        torch.testing.assert_close(norm(ours[3]), ours[4])
        assert not torch.allclose(ours[3], ours[4])
        # The head reads the last: nothing lies between it and the logits.
        torch.testing.assert_close(model.get_output_embeddings()(ours[4]), model(ids).logits)


def test_an_encoder_without_final_norm_has_its_last_state_twice():
    model, ids = tiny.network("bert"), token_ids()
    ours = gathered(model, ids)
    with torch.inference_mode():
        theirs = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours[:4], torch.stack(theirs))
    assert torch.equal(ours[3], ours[4])


def test_layers_are_chosen_by_index_in_the_order_asked():
    model, ids = tiny.network("llama"), token_ids()
    every = gathered(model, ids)
    assert torch.equal(gathered(model, ids, layers=[-1, 0, 3]), every[[4, 0, 3]])
    assert torch.equal(gathered(model, ids, layers=range(2)), every[:2])


@pytest.mark.parametrize("layers", [[5], [-6], [0, 99], []])
def test_a_layer_that_is_not_there(layers):
    with pytest.raises(ValueError, match=r"layers = \[.*\]: choose from 0 to 4"):
        next(hidden.stream(tiny.network("llama"), token_ids(), layers))


@pytest.mark.parametrize("bad", [-1, tiny.VOCAB + 7])
def test_ids_outside_the_vocabulary(bad):
    ids = token_ids()
    ids[2, 3] = bad
    with pytest.raises(
        ValueError, match=f"token ids .*{bad}.*: outside the model's vocabulary of 277"
    ):
        next(hidden.stream(tiny.network("llama"), ids))


def test_nothing_to_run():
    with pytest.raises(ValueError, match="no tokens: give at least one text"):
        next(hidden.stream(tiny.network("llama"), token_ids(0)))


def test_states_that_are_not_finite():
    model = tiny.network("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="NaN or Inf in the hidden states; run the model in float32"
    ):
        next(hidden.stream(model, token_ids()))


def test_states_of_different_widths_are_not_stacked():
    config = tiny.CONFIGS["opt"]()
    config.word_embed_proj_dim = 8
    model = type(tiny.network("opt"))(config).eval()
    with pytest.raises(ValueError, match="they differ in width"):
        next(hidden.stream(model, token_ids()))
    assert next(hidden.stream(model, token_ids(), [-1])).shape[-1] == 8


def short_of_memory(model, limit):
    """Let the model's first block fail as CUDA does on batches above `limit` texts; returns the sizes it saw."""
    sizes, block = [], hidden._blocks(model, token_ids())[0]

    def forward(states, *arguments, run=block.forward, **options):
        sizes.append(len(states))
        if len(states) > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return run(states, *arguments, **options)

    block.forward = forward
    return sizes


def test_the_batch_is_halved_until_it_fits_and_nothing_is_computed_twice(monkeypatch):
    monkeypatch.setattr(hidden, "BATCH", 8)
    model, ids = tiny.network("llama"), token_ids(11)
    expected = gathered(model, ids)
    sizes = short_of_memory(model, 3)
    batches = list(hidden.stream(model, ids))
    torch.testing.assert_close(torch.cat(batches, 1), expected)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]


def test_memory_may_run_out_later_too(monkeypatch):
    monkeypatch.setattr(hidden, "BATCH", 4)
    model, ids = tiny.network("gpt2"), token_ids(9)
    expected = gathered(model, ids)
    batches = hidden.stream(model, ids)
    first = next(batches)
    short_of_memory(model, 2)
    rest = list(batches)
    assert [b.shape[1] for b in [first, *rest]] == [4, 2, 2, 1]
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected)


def test_no_memory_for_a_single_text():
    model = tiny.network("llama")
    short_of_memory(model, 0)
    with pytest.raises(MemoryError, match="no memory for one text of 7 tokens; use shorter texts"):
        next(hidden.stream(model, token_ids()))


def test_an_error_of_the_model_is_not_taken_for_lack_of_memory():
    model = tiny.network("gpt2")
    with pytest.raises(Exception, match="index out of range"):
        next(hidden.stream(model, token_ids(1, 65)))  # more tokens than the model has positions


def test_a_stream_left_halfway_leaves_no_hook():
    model = tiny.network("llama")
    model(token_ids(), output_hidden_states=True)  # transformers leaves hooks of its own
    before = [len(m._forward_hooks) for m in model.modules()]
    batches = hidden.stream(model, token_ids())
    assert not next(batches).requires_grad
    assert [len(m._forward_hooks) for m in model.modules()] == before
    batches.close()


def test_a_model_without_blocks():
    model = tiny.network("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="LlamaForCausalLM: no list of 7 blocks found"):
        next(hidden.stream(model, token_ids()))


def test_sequences_are_the_first_tokens_of_texts_long_enough():
    tokenizer = tiny.fast_tokenizer()
    texts = ["too short", tiny.TEXT * 3, "", tiny.TEXT * 50, "x" * 200]
    ids = hidden.sequences(tokenizer, texts, count=2, length=30)
    for row, text in zip(ids.tolist(), [texts[1], texts[3]], strict=True):
        assert row == tokenizer(text)["input_ids"][:30]
    with pytest.raises(
        ValueError, match="the text has only 3 passages of 30 tokens; give more text"
    ):
        hidden.sequences(tokenizer, texts, count=4, length=30)


@pytest.mark.parametrize(("count", "length"), [(0, 5), (3, 1), (-1, 5)])
def test_sequences_of_impossible_size(count, length):
    with pytest.raises(ValueError, match=f"count = {count}, length = {length}"):
        hidden.sequences(tiny.fast_tokenizer(), [tiny.TEXT], count, length)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))
    return tmp_path


def counted(monkeypatch):
    """The passages that `stream` is asked for from now on."""
    asked = []
    run = hidden.stream

    def stream(model, input_ids, *arguments, **options):
        asked.append(len(input_ids))
        return run(model, input_ids, *arguments, **options)

    monkeypatch.setattr(hidden, "stream", stream)
    return asked


def test_a_passage_is_computed_once_whoever_asks(cache, monkeypatch):
    model, ids = tiny.network("llama"), token_ids(20)
    asked = counted(monkeypatch)
    stored = hidden.store(model, ids[:12])
    np.testing.assert_allclose(stored, gathered(model, ids[:12], layers=[-1])[0], atol=1e-6)
    asked.clear()
    mixed = torch.cat([ids[15:], ids[3:7], ids[15:16]])  # known, new and twice
    again = hidden.store(model, mixed)
    assert asked == [5]
    np.testing.assert_array_equal(again[5:9], stored[3:7])
    np.testing.assert_array_equal(again[9], again[0])
    np.testing.assert_allclose(again, gathered(model, mixed, layers=[-1])[0], atol=1e-6)
    asked.clear()
    hidden.store(tiny.network("llama"), mixed)  # an equal model in another object
    assert not asked
    assert not again.flags.writeable


def test_what_decides_the_states_names_their_store(cache):
    model, ids = tiny.network("llama"), token_ids(3)
    stored = np.array(hidden.store(model, ids))
    assert not np.array_equal(hidden.store(tiny.network("llama", seed=1), ids), stored)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.data[0] += 1  # behind autograd's back
    assert not np.array_equal(hidden.store(model, ids), stored)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 0.5}, {"hidden_act": "gelu"}, {"rope_theta": 100.0}]
)
def test_a_corrected_configuration_gives_new_states(cache, tmp_path, change):
    config = tiny.CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "model")
    before = np.array(hidden.store(model, token_ids(3)))
    file = tmp_path / "model" / "config.json"
    said = json.loads(file.read_text())
    said.update(change)
    said["rope_parameters"].update({k: v for k, v in change.items() if k == "rope_theta"})
    file.write_text(json.dumps(said))
    corrected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    after = hidden.store(corrected, token_ids(3))
    assert not np.allclose(after, before, atol=1e-3)
    np.testing.assert_allclose(after, gathered(corrected, token_ids(3), layers=[-1])[0], atol=1e-5)


@pytest.mark.slow
def test_a_killed_store_keeps_what_is_whole_and_nothing_else(cache, monkeypatch):
    monkeypatch.setattr(hidden, "CHUNK", 14)  # two passages at a time
    code = """
import contextlib, os, signal, sys
import tiny, test_hidden
from headbound import hidden
hidden.CHUNK = 14
replacing, calls = hidden.replacing, []
@contextlib.contextmanager
def dying(index):
    calls.append(index)
    if len(calls) == 2:
        states = index.with_name("states")
        if sys.argv[1] == "states":  # half of the second two is written
            os.truncate(states, states.stat().st_size * 3 // 4)
        else:
            index.with_name(".index").write_text("[16, [")
        os.kill(os.getpid(), signal.SIGKILL)
    with replacing(index) as temporary:
        yield temporary
hidden.replacing = dying
hidden.store(tiny.network("llama"), test_hidden.token_ids(6))
"""
    model, ids = tiny.network("llama"), token_ids(6)
    expected = gathered(model, ids, layers=[-1])[0].numpy()
    for place in ("states", "index"):
        command = [sys.executable, "-c", code, place]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
        assert done.returncode == -9, done.stderr
        asked = counted(monkeypatch)
        np.testing.assert_allclose(hidden.store(model, ids), expected, atol=1e-6)
        assert sum(asked) == 4
        monkeypatch.undo()
        monkeypatch.setenv("HEADBOUND_CACHE", str(cache))
        monkeypatch.setattr(hidden, "CHUNK", 14)
        shutil.rmtree(cache / "hidden")


@pytest.mark.slow
def test_processes_share_one_store(cache):
    code = (
        "import tiny, test_hidden\n"
        "from headbound import hidden; hidden.CHUNK = 14\n"
        "hidden.store(tiny.network('llama'), test_hidden.token_ids(30))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (index,) = (cache / "hidden").rglob("index.json")
    width, known = json.loads(index.read_text())
    assert (width, len(known), len(set(known))) == (16, 30, 30)  # each passage once
    model, ids = tiny.network("llama"), token_ids(30)
    expected = gathered(model, ids, layers=[-1])[0].numpy()
    np.testing.assert_allclose(hidden.store(model, ids), expected, atol=1e-6)


def test_a_full_disk_is_found_before_the_work(cache, monkeypatch):
    model, ids = tiny.network("llama"), token_ids(4)
    hidden.store(model, ids[:1])
    free = shutil.disk_usage(cache)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    asked = counted(monkeypatch)
    with pytest.raises(OSError, match=r"1,344 bytes are needed and 100 are free; free some space"):
        hidden.store(model, ids)
    assert not asked
    np.testing.assert_array_equal(hidden.store(model, ids[:1])[0].shape, (7, 16))


def test_a_text_longer_than_the_model_reads_is_cut_without_a_word(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny.fast_tokenizer()
    tokenizer.model_max_length = 8
    assert hidden.sequences(tokenizer, [tiny.TEXT * 9], count=1, length=6).shape == (1, 6)
    assert not caplog.records
    tokenizer(tiny.TEXT * 9)
    assert "longer than" in caplog.text  # what it would have said


def test_the_tokenizers_own_start_comes_first():
    plain, starting = tiny.fast_tokenizer(), tiny.starting_tokenizer()
    texts = [tiny.TEXT * 3]
    start = starting.bos_token_id
    ids = hidden.sequences(starting, texts, 1, 20)[0].tolist()
    assert ids == [start, *hidden.sequences(plain, texts, 1, 19)[0].tolist()]
    assert ids == starting(texts[0])["input_ids"][:20]


def test_a_token_put_behind_a_text_is_left_out():
    made = tiny.tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    ending = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    short = tiny.fast_tokenizer()(tiny.TEXT)["input_ids"]
    with pytest.raises(ValueError, match="only 0 passages"):
        hidden.sequences(ending, [tiny.TEXT], 1, len(short) + 1)
    assert hidden.sequences(ending, [tiny.TEXT], 1, len(short))[0].tolist() == short


def test_texts_with_more_tokens_than_characters_and_fewer_are_used():
    parrots = "\U0001f99c" * 50  # four byte tokens each
    assert hidden.sequences(tiny.fast_tokenizer(), [parrots], 1, 128).shape == (1, 128)
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "a" * 40: 1}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.Split("a" * 40, "isolated")
    long = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert hidden.sequences(long, ["a" * 4000], 1, 100).shape == (1, 100)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconMamba", "Rwkv"])
def test_recurrent_models_have_their_states_named_rightly(kind):
    size = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}
    if kind == "Mamba2":
        size |= {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1}
    if kind == "Rwkv":
        size = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 8}
    config = getattr(transformers, f"{kind}Config")(**size)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    ids = torch.randint(50, (2, 7))
    blocks = model.backbone.layers if "amba" in kind else model.rwkv.blocks
    true = []
    for block in blocks:
        block.register_forward_hook(lambda _m, _i, o: true.append(o[0] if type(o) is tuple else o))
    with torch.no_grad():
        last = model(ids, output_hidden_states=True).hidden_states[-1]
    ours = gathered(model, ids)
    torch.testing.assert_close(ours[0], model.get_input_embeddings()(ids).detach())
    for number, state in enumerate(true[: len(blocks)], 1):
        torch.testing.assert_close(ours[number], state.detach())
    torch.testing.assert_close(ours[-1], last)


def test_a_layout_that_cannot_be_verified_is_refused_by_name():
    model = tiny.network("llama")
    second = model.model.layers[1]
    run = second.forward
    second.forward = lambda states, *a, **k: run(states.roll(1, -1), *a, **k)
    second.register_forward_pre_hook(lambda _m, inputs: (inputs[0] ** 2,), prepend=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM: block 2 does not read what block 1"):
        next(hidden.stream(model, token_ids()))
    assert next(hidden.stream(tiny.network("llama"), token_ids(), [-1])).shape == (1, 5, 7, 16)


def test_only_what_is_asked_for_is_computed():
    model, ids = tiny.network("llama"), token_ids()
    next(hidden.stream(model, ids))
    calls = []
    model.model.layers[2].register_forward_hook(lambda *_: calls.append("block 3"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    next(hidden.stream(model, ids, [0, 2]))
    assert calls == []
    next(hidden.stream(model, ids, [-1]))
    assert calls == ["block 3"]
