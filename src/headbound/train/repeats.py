"""A language of repetitions, learnt by a model with next to nothing but a head."""

import torch
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import device
from headbound.measure.gradients import share_kept
from headbound.measure.lowrank import Examples
from headbound.train.step import Recipe

BATCH = 256  # tokens a step
SHOWN = 512  # tokens that the trained model is measured on, at most
WARMUP = 0.05  # of the steps


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they were
def learn(
    vocab: int,
    d: int,
    peak: float,
    steps: int = 300,
    layers: int = 0,
    momentum: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train a GPT-NeoX to say the token before once more, every token equally likely.

    Without layers, embedding, final norm and head are all there is. The learning rate is warmed up
    to its peak and falls as a cosine. With a momentum this is plain gradient descent, else Adam.

    **Returns:** at the end, over tokens spread evenly over the vocabulary, loss (nats), learned
    (share of tokens said right) and kept (share of the squared logit gradient).

    **Raises:** `FloatingPointError` if it diverges.
    """
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=1,
    )
    model = GPTNeoXForCausalLM(config).to(device.pick())
    if momentum is None:
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=momentum)
    schedule = Recipe(8, max(steps, 1), peak=peak, warmup=WARMUP)  # for its learning rate alone
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(step)
        drawn = torch.randint(vocab, (BATCH, 1), device=model.device)
        logits = model(drawn, use_cache=False).logits[:, 0]
        optimizer.zero_grad()
        cross_entropy(logits, drawn[:, 0]).backward()
        optimizer.step()
    shown = torch.arange(0, vocab, max(1, vocab // SHOWN), device=model.device)[:SHOWN]
    with torch.no_grad():
        states = model.base_model(shown[:, None]).last_hidden_state[:, 0]
        logits = model.lm_head(states)
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"peak = {peak}: training diverged at V = {vocab}; lower it")
    numbers = shown.cpu().numpy()
    data = Examples(states.cpu().numpy(), numbers, numbers)
    squares = share_kept(data, model.lm_head.weight.detach())
    return {
        "loss": cross_entropy(logits, shown).item(),
        "learned": (logits.argmax(1) == shown).double().mean().item(),
        "kept": float(squares.kept.sum() / squares.gradient.sum()),
    }
