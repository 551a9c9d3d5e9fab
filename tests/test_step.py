from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXForCausalLM

from headbound import pythia
from headbound.train.step import Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(8, 40, vocab_size=60, layers=1, context=16, batch_size=4)


def trainer(recipe=RECIPE, build=GPTNeoXForCausalLM):
    torch.manual_seed(recipe.seed)
    return Trainer(build(recipe.config(0)), recipe)


def windows(step):
    # Zipf's law, so that rows are moved unequally.
    generator = torch.Generator().manual_seed(step)
    shares = 1 / torch.arange(1, 61).float()
    return torch.multinomial(shares, 4 * 17, True, generator=generator).view(4, 17)


def trained(recipe, steps=8):
    found = trainer(recipe)
    for step in range(steps):
        found.apply(found.loss(windows(step)), 0.01)
    return found


def head(found):
    return found.model.get_output_embeddings().weight.detach()


def test_an_update_is_torchs_own():
    found, torch_model = trained(RECIPE, 5), trainer().model
    model = GPTNeoXForCausalLM(torch_model.config)
    model.load_state_dict({name: value.clone() for name, value in torch_model.state_dict().items()})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": RECIPE.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step in range(5):
        rows = windows(step)
        logits = model(rows[:, :-1], use_cache=False).logits
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(found.model.state_dict()[name], value, atol=2e-5), name


def test_only_adam_moves_the_mean_row():
    start = head(trainer()).mean(0)

    def moved(**change):
        found = trained(replace(RECIPE, weight_decay=0.0, **change))
        return float((head(found).mean(0) - start).norm())

    adam = moved()
    assert adam > 0.01
    assert moved(optimizer="sgd") < 1e-6
    # One second moment for all rows scales all of them alike, so their sum stays.
    assert moved(optimizer="coupled") < 1e-6
    assert float(head(trained(replace(RECIPE, centred=True))).mean(0).norm()) < 1e-7


def test_coupled_adam_with_one_row_of_each_kind_is_adam():
    # Where all rows have one second moment anyway, coupling changes nothing: here all but tables.
    plain, coupled = (trained(replace(RECIPE, optimizer=name), 1) for name in ("adamw", "coupled"))
    tables = {id(plain.model.get_input_embeddings().weight), id(plain.model.lm_head.weight)}
    pairs = zip(plain.model.parameters(), coupled.model.parameters(), strict=True)
    for one, other in pairs:
        if id(one) not in tables:
            assert torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(head(plain), head(coupled), atol=1e-4)


@pytest.mark.parametrize(("precision", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_a_rounded_recipe_shows_rounded_weights_and_keeps_exact_ones(precision, digits):
    found = trained(replace(RECIPE, precision=precision))
    shown = head(found)
    mantissa, _ = torch.frexp(shown)
    assert torch.equal(mantissa * 2**digits, (mantissa * 2**digits).round())
    start = found.flat[0].weights.detach()
    assert not torch.equal(start, found.flat[0].shown)
    assert torch.allclose(start, found.flat[0].shown, rtol=2.0**-digits, atol=1e-7)


def test_a_cut_keeps_half_of_the_directions():
    rows = windows(0)
    whole = trained(RECIPE)
    weight = head(whole)
    kept = torch.linalg.svd(weight, full_matrices=False).Vh[:4]
    gradients = {}
    for cut in ("none", "forward", "backward"):
        whole.recipe = replace(RECIPE, cut=cut)
        loss = whole.loss(rows)
        loss.backward()
        gradients[cut] = float(loss.detach()), whole.model.lm_head.weight.grad.clone()
        for flat in whole.flat:
            flat.weights.grad.zero_()
    assert gradients["backward"][0] == pytest.approx(gradients["none"][0], rel=1e-6)
    assert gradients["forward"][0] != pytest.approx(gradients["none"][0], rel=1e-6)
    projection = kept.T @ kept
    expected = gradients["none"][1] @ projection
    assert torch.allclose(gradients["backward"][1], expected, atol=1e-6)
    assert int(torch.linalg.matrix_rank(gradients["forward"][1], rtol=1e-4)) == 4


def test_unused_tokens_have_rows_and_never_occur():
    model = trainer(replace(RECIPE, unused=0.2)).model
    assert model.config.vocab_size == 75
    assert trainer().model.num_parameters() == pythia.count(1, 8, 60)


def test_the_state_holds_all_that_the_next_steps_need():
    for optimizer in ("adamw", "coupled", "sgd"):
        recipe = replace(RECIPE, optimizer=optimizer)
        whole, first, second = trained(recipe, 6), trained(recipe, 3), trainer(recipe)
        second.restore(first.state())
        for step in range(3, 6):
            second.apply(second.loss(windows(step)), 0.01)
        assert torch.equal(head(whole), head(second))


def test_a_head_with_a_bias_goes_the_long_way():
    linear = torch.nn.Linear(8, 60)
    found = trainer(build=lambda config: with_bias(config, linear))
    rows = windows(0)
    logits = found.model(rows[:, :-1]).logits.flatten(0, 1)
    assert found.loss(rows).item() == pytest.approx(
        cross_entropy(logits, rows[:, 1:].flatten()).item(), rel=1e-6
    )


def with_bias(config, linear):
    model = GPTNeoXForCausalLM(config)
    model.set_output_embeddings(linear)
    return model


def test_a_recipe_is_frozen_and_refuses_what_cannot_be():
    with pytest.raises(FrozenInstanceError):
        RECIPE.steps = 3
    assert Recipe(**asdict(RECIPE)) == RECIPE
    with pytest.raises(ValueError, match="a rounded recipe has neither z-loss nor centred rows"):
        replace(RECIPE, precision="float16", z_loss=0.1)
    assert RECIPE.learning_rate(39) == pytest.approx(0.1 * RECIPE.peak, rel=0.02)
