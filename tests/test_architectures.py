"""Every number of the book, on a tiny model of each architecture, beside its definition in float64."""

import copy

import numpy as np
import pytest
import torch
import transformers
from scipy.special import log_softmax

from headbound import hidden, models
from headbound.measure import anisotropy, gradients, spectrum
from headbound.measure.lowrank import Examples
from headbound.train import callback

V = 61
SIZE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZE, "num_key_value_heads": 1, "head_dim": 8}
GPT = {"vocab_size": V, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Kind: its configuration, with the oddities that it is known for, and the scale of its logits.
KINDS = {
    "GPT2": (GPT, 1),
    "GPTBigCode": (GPT, 1),
    "GPTJ": ({**GPT, "rotary_dim": 4}, 1),  # a head with a bias
    "CodeGen": ({**GPT, "n_head": 4, "rotary_dim": 4}, 1),  # a head with a bias
    "OpenAIGPT": (GPT, 1),  # no final norm
    "CTRL": ({**GPT, "dff": 32}, 1),  # a tied head with a bias
    "GPTNeo": (
        {
            **{"vocab_size": V, "hidden_size": 16, "num_layers": 2, "num_heads": 2},
            "attention_types": [[["global", "local"], 1]],
        },
        1,
    ),
    "GPTNeoX": (SIZE, 1),
    "OPT": ({**SIZE, "ffn_dim": 32, "word_embed_proj_dim": 16}, 1),
    "OPT-350m": (
        {**SIZE, "ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
        1,
    ),
    "Bloom": ({"vocab_size": V, "hidden_size": 16, "n_layer": 3, "n_head": 2}, 1),
    "Mpt": ({"vocab_size": V, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 64}, 1),
    "Falcon": ({**SIZE, "bias": False}, 1),
    "Llama": (SIZE, 1),
    "Mistral": ({**SIZE, "num_key_value_heads": 1}, 1),
    "Mixtral": ({**SIZE, **EXPERTS, "num_key_value_heads": 1}, 1),
    "Qwen2": ({**SIZE, "num_key_value_heads": 1, "tie_word_embeddings": True}, 1),
    "Qwen3": (GROUPED, 1),
    "Olmo": (SIZE, 1),  # a norm without parameters
    "Olmo2": (SIZE, 1),
    "Phi": (SIZE, 1),  # a head with a bias
    "Phi3": ({**SIZE, "pad_token_id": 0}, 1),
    "StableLm": ({**SIZE, "num_key_value_heads": 2}, 1),
    "Starcoder2": ({**SIZE, "num_key_value_heads": 1}, 1),
    "Gemma": (GROUPED, 1),  # scaled embeddings
    "Gemma2": ({**GROUPED, "final_logit_softcapping": 3.0}, 1),
    "Gemma3": (GROUPED, 1),
    "RecurrentGemma": ({**SIZE, "lru_width": 16, "logits_soft_cap": 3.0}, 1),
    "NanoChat": (SIZE, 1),  # a soft cap of 15
    "Granite": ({**SIZE, "logits_scaling": 8.0}, 1 / 8),
    "Cohere": ({**SIZE, "num_key_value_heads": 2, "pad_token_id": 0}, 1 / 16),
    "Mamba": ({"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}, 1),
    "FalconMamba": (
        {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4},
        1,
    ),
    "Rwkv": ({"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 8}, 1),
    "Bert": ({**SIZE, "is_decoder": True}, 1),  # layers between the last state and the head
    "Roberta": ({**SIZE, "is_decoder": True, "pad_token_id": 0}, 1),
}
CLASSES = {
    "OPT-350m": "OPTForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "OpenAIGPT": "OpenAIGPTLMHeadModel",
    "CTRL": "CTRLLMHeadModel",
    "Bert": "BertLMHeadModel",
}


def network(kind):
    options, _ = KINDS[kind]
    maker = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))
    config = maker.config_class(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = maker(config).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.4)
    return model


@torch.inference_mode()
def in_float64(model, ids):
    """Final states, head, logits and targets, a row a token, from a copy in float64."""
    precise = copy.deepcopy(model).double()
    precise.config._experts_implementation = "eager"  # the others have no float64
    entered = []
    head = precise.get_output_embeddings()
    head.register_forward_pre_hook(lambda _m, inputs: entered.append(inputs[0]))
    logits = precise(ids[:, :-1], use_cache=False).logits
    states = entered[0].flatten(0, 1).numpy()
    return states, head.weight.numpy(), logits.flatten(0, 1).numpy(), ids[:, 1:].flatten().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_entropy_cosine_and_gradient_share(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path))
    model = network(kind)
    ids = torch.randint(3, V, (4, 17), generator=torch.Generator().manual_seed(0))
    states, weight, logits, targets = in_float64(model, ids)
    read = models.readout(model, None, ids)
    stored = hidden.store(model, ids[:, :-1])
    ours = stored.reshape(-1, stored.shape[-1])

    loss = -log_softmax(logits, 1)[np.arange(len(targets)), targets].mean()
    found = torch.nn.functional.cross_entropy(
        read.logits(torch.tensor(ours).double()), torch.tensor(targets)
    )
    assert found.item() == pytest.approx(loss, abs=1e-4)
    with torch.inference_mode():
        says = model(ids, labels=ids, use_cache=False).loss
    assert found.item() == pytest.approx(says.item(), abs=1e-4)
    assert read.scale == pytest.approx(KINDS[kind][1], rel=1e-3 if read.cap else 1e-5)

    values = np.linalg.svd(weight, compute_uv=False)
    shares = values / values.sum()
    entropy = np.log(len(shares)) + (shares * np.log(shares)).sum()
    mine = spectrum.singular_entropy(spectrum.singular_values(read.weight))
    assert mine == pytest.approx(entropy, rel=1e-5)

    units = states / np.linalg.norm(states, axis=1, keepdims=True)
    cosines = units @ units.T
    mean = cosines[~np.eye(len(units), dtype=bool)].mean()
    assert anisotropy.mean_cosine(torch.tensor(ours)).value == pytest.approx(mean, abs=1e-5)

    g = np.exp(log_softmax(logits, 1))
    g[np.arange(len(targets)), targets] -= 1
    basis, sizes, _ = np.linalg.svd(weight, full_matrices=False)
    kept = g @ basis[:, sizes > 1e-9 * sizes[0]]
    share = (kept**2).sum() / (g**2).sum()
    data = Examples(ours, targets, np.repeat(np.arange(4), 16))
    squares = gradients.share_kept(data, read.weight, logits=read.logits)
    assert squares.share().value == pytest.approx(share, rel=1e-4)
    if kind != "OPT-350m":  # whose last two layers differ in width
        watched = callback.measure(model, ids)
        assert watched["gradient_kept"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_what_its_name_says(kind):
    model = network(kind)
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
    names = hidden.layer_names(model)
    with torch.inference_mode():
        theirs = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for place in range(len(names) - 1):
        (states,) = next(hidden.stream(model, ids, [place]))
        if kind not in ("Mamba", "FalconMamba", "Rwkv") and place < len(names) - 2:
            torch.testing.assert_close(states, theirs[place])
    (last,) = next(hidden.stream(model, ids, [-1]))
    if kind not in ("Bert", "Roberta", "OPT-350m"):  # more lies between the last state and the head
        torch.testing.assert_close(last, theirs[-1])


def test_what_no_scale_and_cap_explain_is_refused():
    class Squared(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states) ** 2

    model = network("Llama")
    model.lm_head.__class__ = Squared
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: scale, bias and cap leave \d.*%"):
        models.readout(model, None, torch.randint(V, (2, 9)))


def test_a_model_that_reads_what_it_is_to_predict_is_refused():
    """Its loss is low and no loss of prediction: BERT as it was trained, and XLNet."""
    both = transformers.BertLMHeadModel(transformers.BertConfig(**SIZE)).eval()
    options = {"vocab_size": V, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
    permuted = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**options)).eval()
    for model in (both, permuted):
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.4)
        with pytest.raises(ValueError, match="it reads the tokens that it is to predict"):
            models.readout(model, None, torch.randint(3, V, (4, 17)))


def test_a_decoder_whose_configuration_counts_an_encoder_too():
    config = transformers.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=2, decoder_layers=3, decoder_ffn_dim=32
    )
    model = transformers.BartForCausalLM(config).eval()
    ids = torch.randint(3, V, (2, 9))
    assert hidden.layer_names(model)[1:-1] == ["block 1", "block 2", "block 3"]
    with torch.inference_mode():
        theirs = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for place in range(3):
        torch.testing.assert_close(next(hidden.stream(model, ids, [place]))[0], theirs[place])


def test_a_model_of_several_heads_is_refused():
    config = transformers.MusicgenDecoderConfig(
        vocab_size=V, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="MusicgenForCausalLM has several heads"):
        models.head_weight(transformers.MusicgenForCausalLM(config))


def test_more_dimensions_than_tokens():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZE, "vocab_size": 7, "hidden_size": 32})
    ).eval()
    read = models.readout(model, None, torch.randint(7, (2, 9)))
    assert read.matrix().shape == (7, 32)
    assert abs(read.gap) < 1e-4


@pytest.mark.parametrize("kind", ["Phi", "Granite", "Llama"])
def test_the_linear_head_reads_its_inputs(kind):
    model = network(kind)
    ids = torch.randint(V, (2, 9))
    read = models.readout(model, None, ids)
    states = next(hidden.stream(model, ids, [-1]))[0].flatten(0, 1).numpy()
    logits = read.inputs(states) @ read.matrix().numpy().T
    with torch.inference_mode():
        np.testing.assert_allclose(logits, model(ids).logits.flatten(0, 1), atol=1e-3)
    assert (read.matrix() is read.weight) == (kind == "Llama")


def test_padding_rows_and_half_precision():
    model = network("GPTNeoX").bfloat16()
    read = models.readout(model, None, torch.randint(V, (4, 33)))
    assert read.cap is None
    assert abs(read.gap) < 0.2
