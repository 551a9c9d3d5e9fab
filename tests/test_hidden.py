import errno
import logging

import numpy as np
import pytest
import tiny
import torch

from headbound import hidden

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
def test_states_are_the_models_own_with_the_norm_told_apart(kind):
    model, ids = tiny.network(kind), token_ids()
    ours = gathered(model, ids, batch_size=2)
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


@pytest.mark.parametrize(("texts", "batch_size"), [(0, 4), (3, 0)])
def test_nothing_to_run(texts, batch_size):
    with pytest.raises(ValueError, match="both must be at least one"):
        next(hidden.stream(tiny.network("llama"), token_ids(texts), batch_size=batch_size))


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
    sizes, block = [], hidden._blocks(model)[0]

    def forward(states, *arguments, run=block.forward, **options):
        sizes.append(len(states))
        if len(states) > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return run(states, *arguments, **options)

    block.forward = forward
    return sizes


def test_the_batch_is_halved_until_it_fits_and_nothing_is_computed_twice():
    model, ids = tiny.network("llama"), token_ids(11)
    expected = gathered(model, ids)
    sizes = short_of_memory(model, 3)
    batches = list(hidden.stream(model, ids, batch_size=8))
    torch.testing.assert_close(torch.cat(batches, 1), expected)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]


def test_memory_may_run_out_later_too():
    model, ids = tiny.network("gpt2"), token_ids(9)
    expected = gathered(model, ids)
    batches = hidden.stream(model, ids, batch_size=4)
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
    batches = hidden.stream(model, token_ids(), batch_size=1)
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


def test_stored_states_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))
    model, ids = tiny.network("llama"), token_ids(20)
    stored = hidden.store(model, ids)
    np.testing.assert_array_equal(stored, gathered(model, ids, layers=[-1])[0].numpy())
    other = tiny.network("llama", seed=1)
    assert not np.array_equal(hidden.store(other, ids), stored)
    assert not np.array_equal(hidden.store(model, ids, layer=1), stored)
    monkeypatch.setattr(hidden, "stream", lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(hidden.store(model, ids), stored)


def test_a_failed_store_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hidden, "stream", full)
    with pytest.raises(
        OSError, match=r"No space left on device; free some space or set HEADBOUND_CACHE"
    ):
        hidden.store(tiny.network("llama"), token_ids())
    assert not list((tmp_path / "hidden").iterdir())


def test_a_text_longer_than_the_model_reads_is_cut_without_a_word(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny.fast_tokenizer()
    tokenizer.model_max_length = 8
    assert hidden.sequences(tokenizer, [tiny.TEXT * 9], count=1, length=6).shape == (1, 6)
    assert not caplog.records
    tokenizer(tiny.TEXT * 9)
    assert "longer than" in caplog.text  # what it would have said
