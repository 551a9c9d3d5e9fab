"""A Trainer's run, watched: the log, the warning where it belongs, and none where it does not."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from headbound import corpus, pythia
from headbound.measure import checkpoint
from headbound.train import callback

pytestmark = pytest.mark.usefixtures("one_thread")
V = 512
LENGTH = 32


@pytest.fixture(scope="module")
def rows():
    texts = corpus.load("docstrings")[:1500]
    stream = np.array(corpus.encode(corpus.train_bpe(texts, V), texts))
    count = len(stream) // LENGTH
    return torch.from_numpy(stream[: count * LENGTH].reshape(count, LENGTH)).long()


def trainer(rows, folder, *, tied=True, steps=12, **options):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied
    )
    data = [{"input_ids": row, "labels": row} for row in rows[64:400]]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-2,
        **options,
    )
    return Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data)


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": False}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["tied", "untied", "accumulated", "bfloat16"],
)
def test_a_sound_run_is_logged_and_not_warned_of(rows, tmp_path, options):
    run = trainer(rows, tmp_path, **options)
    watched = callback.watch(run, rows[:8], every=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="step .*nats")
        run.train()
    assert [row["step"] for row in watched.rows] == [1, 4, 8, 12]
    logged = [entry for entry in run.state.log_history if "saturation/singular_entropy" in entry]
    assert [entry["saturation/loss"] for entry in logged] == [row["loss"] for row in watched.rows]
    assert watched.rows[-1]["loss"] < watched.rows[0]["loss"]
    assert run.model.training


def test_what_can_not_be_measured_is_warned_of_and_the_training_goes_on(rows, tmp_path):
    run = trainer(rows, tmp_path, max_grad_norm=0.0)
    run.args.learning_rate = 1e30
    watched = callback.watch(run, rows[:8].int(), every=4)
    with pytest.warns(UserWarning, match="not measured: NaN or Inf"):
        run.train()
    assert run.state.global_step == 12
    assert watched.rows == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2), "1 tokens to predict"),
        ((4, 2 * LENGTH), f"the model reads {LENGTH} tokens at most"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_the_training(rows, tmp_path, shape, message):
    with pytest.raises(ValueError, match=message):
        callback.watch(trainer(rows, tmp_path), torch.zeros(shape, dtype=torch.long))


def test_the_numbers_follow_from_their_definitions(rows, tmp_path):
    model = trainer(rows, tmp_path, tied=False).model.eval().double()
    found = checkpoint.measure(model, rows[:8]) | checkpoint.outputs(model, rows[:8])
    with torch.no_grad():
        logits = model(rows[:8, :-1]).logits
        states = model.transformer(rows[:8, :-1]).last_hidden_state.flatten(0, 1)
    W = model.lm_head.weight.detach()
    loss = cross_entropy(logits.flatten(0, 1), rows[:8, 1:].flatten())
    units = states / states.norm(dim=1, keepdim=True)
    cosines = units @ units.T
    pairs = len(units) * (len(units) - 1)
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert found["anisotropy_after_norm"] == pytest.approx(
        ((cosines.sum() - cosines.trace()) / pairs).item(), abs=1e-4
    )
    for name, matrix in {"singular_entropy": W, "singular_entropy_centred": W - W.mean(0)}.items():
        p = np.linalg.svd(matrix.numpy(), compute_uv=False)
        p = p / p.sum()
        assert found[name] == pytest.approx(np.log(len(p)) + (p * np.log(p)).sum(), abs=1e-5)
    share = V * W.mean(0).square().sum() / W.square().sum()
    assert found["mean_row_share"] == pytest.approx(share.item(), rel=1e-4)
    assert found["logit_mean"] == pytest.approx(logits.mean().item(), abs=1e-5)


class GoesWrong(Trainer):
    """From step 12 on, every update adds one direction to all rows of the head and all states."""

    def training_step(self, model, inputs, *rest):
        loss = super().training_step(model, inputs, *rest)
        if self.state.global_step >= 12:
            with torch.no_grad():
                model.lm_head.weight[:, 0] += 0.5
                model.transformer.ln_f.bias[0] += 2.0
                model.transformer.ln_f.weight *= 0.9
        return loss


def test_a_run_made_to_go_wrong_is_warned_of_once(rows, tmp_path):
    run = trainer(rows, tmp_path, tied=False, steps=24)
    run.__class__ = GoesWrong
    callback.watch(run, rows[:8], every=4)
    with pytest.warns(UserWarning, match="above its least") as told:
        run.train()
    assert len([w for w in told if "above its least" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("size", "warned"),
    [("14M", True), ("31M", True), ("70M", True), ("160M", True), ("410M", False)],
)
def test_the_thresholds_on_the_papers_own_curves(size, warned):
    figure = pythia.figures("3", curve=size)
    curves = figure.pivot_table(index="x", columns="y_name", values="y")
    entropy = pythia.figures("5", curve=size).sort_values("x")
    steps = curves.index.to_numpy()
    history = [
        {"loss": loss, "anisotropy_after_norm": cosine, "singular_entropy": value}
        for loss, cosine, value in zip(
            np.log(curves["Wikitext word perplexity"]),
            curves["last-layer mean cosine"],
            np.interp(steps, entropy["x"], entropy["y"]),
            strict=True,
        )
    ]
    everywhere = [len(callback._signs(history[: place + 1])) == 3 for place in range(len(history))]
    assert everywhere[-1] == warned
    assert any(everywhere) == warned
