"""Hidden states of every layer, streamed in bounded memory."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headbound.cache import cache_dir, replacing
from headbound.models import fingerprint
from headbound.progress import bar


def sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int
) -> Int[Tensor, "texts length"]:
    """The first `length` tokens of the first `count` texts that have as many: no padding, nothing added.

    **Raises:** `ValueError` if the texts are too few or too short.
    """
    if count < 1 or length < 2:
        raise ValueError(
            f"count = {count}, length = {length}: at least one text of two tokens is needed"
        )
    rows: list[list[int]] = []
    for text in texts:
        # A token has at least one character, so most short texts are passed over without tokenizing them.
        if len(text) >= length:
            # Silently: a tokenizer warns of texts that are longer than its model reads, and this one is cut below.
            ids = tokenizer(text[: 16 * length], add_special_tokens=False, verbose=False)[
                "input_ids"
            ][:length]
            rows += [ids] if len(ids) == length else []
        if len(rows) == count:
            return torch.tensor(rows)
    raise ValueError(
        f"count = {count}, length = {length}: the text has only {len(rows)} passages of {length} tokens; "
        "give more text, or ask for fewer or shorter ones"
    )


def layer_names(model: nn.Module) -> list[str]:
    """The names of what `stream` yields: `embeddings`, `block 1` … `block L`, `final norm`."""
    return [
        "embeddings",
        *(f"block {i}" for i in range(1, model.config.num_hidden_layers + 1)),
        "final norm",
    ]


def stream(
    model: nn.Module,
    input_ids: Int[Tensor, "texts length"],
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Iterator[Float[Tensor, "layers batch length d"]]:
    """Hidden states batch by batch, on the model's device, in the model's precision.

    transformers returns the last block's output *after* the final norm and hides the one before it, so the last
    block is caught by a hook: layer L is before the norm, layer L + 1 (or -1) after it. In a model without a final
    norm (BERT's family) the two are equal.

    **Arguments:**

    - `layers`: indices into `layer_names(model)`; all of them if None.
    - `batch_size`: texts at once to begin with; halved until a batch fits in memory.

    **Raises:** `ValueError` for a layer that is not there, NaN or Inf in the states, or ids outside the vocabulary;
    `MemoryError` if not even one text fits.
    """
    names = layer_names(model)
    chosen = list(range(len(names)) if layers is None else layers)
    if not chosen or any(not -len(names) <= i < len(names) for i in chosen):
        raise ValueError(
            f"layers = {chosen}: choose from 0 to {len(names) - 1}, this model's layers (-1 is the last)"
        )
    if batch_size < 1 or not input_ids.numel():
        raise ValueError(
            f"batch_size = {batch_size}, {input_ids.numel()} tokens: both must be at least one"
        )
    if (
        int(input_ids.max()) >= model.get_input_embeddings().num_embeddings
        or int(input_ids.min()) < 0
    ):
        raise ValueError(
            f"token ids from {int(input_ids.min())} to {int(input_ids.max())}: outside the model's vocabulary of "
            f"{model.get_input_embeddings().num_embeddings}; use its tokenizer"
        )
    base = getattr(model, "base_model", model)  # without the head: no logits are computed
    last_block = _blocks(model)[-1]

    @torch.inference_mode()
    def forward(batch: Tensor) -> Tensor:
        caught: list[Tensor] = []
        with last_block.register_forward_hook(
            lambda _module, _inputs, output: caught.append(_first(output))
        ):
            output = base(batch.to(model.device), output_hidden_states=True, use_cache=False)
        every = [*output.hidden_states[:-1], caught[0], output.last_hidden_state]
        if (
            len({every[i].shape[-1] for i in chosen}) > 1
        ):  # OPT-350m projects its final norm's output
            raise ValueError(
                f"layers = {chosen}: they differ in width in this model; ask for them one by one"
            )
        states = torch.stack([every[i] for i in chosen])
        if not torch.isfinite(states).all():
            raise ValueError("NaN or Inf in the hidden states; run the model in float32")
        return states

    while len(input_ids):
        states = _fitting(forward, input_ids, batch_size)
        batch_size = states.shape[1]
        yield states
        input_ids = input_ids[batch_size:]


def store(
    model: nn.Module, input_ids: Int[Tensor, "texts length"], layer: int = -1
) -> Float[np.ndarray, "texts length d"]:
    """One layer's hidden states on disk, memory-mapped: computed once a model and text, whoever asks.

    Kept in the cache under a hash of token ids, layer and weights.

    **Arguments:**

    - `layer`: index into `layer_names(model)`; -1, after the final norm, is what the head reads.

    **Returns:** float32, read-only.
    """
    asked = (
        f"{layer} {tuple(input_ids.shape)} {fingerprint(model)}".encode()
        + input_ids.cpu().numpy().tobytes()
    )
    path = cache_dir() / "hidden" / f"{hashlib.sha256(asked).hexdigest()[:32]}.npy"
    if not path.exists():
        shape = (*input_ids.shape, model.config.hidden_size)
        with replacing(path) as temporary:
            states, start = np.lib.format.open_memmap(temporary, "w+", np.float32, shape), 0
            with bar(None, "hidden states", total=len(input_ids)) as done:
                for (batch,) in stream(model, input_ids, [layer]):
                    states[start : start + len(batch)] = batch.detach().float().cpu().numpy()
                    start += len(batch)
                    done.update(len(batch))
            states.flush()
    return np.load(path, mmap_mode="r")


def _fitting(forward: Callable[[Tensor], Tensor], input_ids: Tensor, batch_size: int) -> Tensor:
    while True:
        try:
            return forward(input_ids[:batch_size])
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size == 1:
                raise MemoryError(
                    f"no memory for one text of {input_ids.shape[1]} tokens; use shorter texts or a smaller model"
                ) from error
        # Past the except block, where the error no longer holds what filled the memory.
        batch_size = min(batch_size, len(input_ids)) // 2 or 1
        clear_device_cache(garbage_collection=True)


def _blocks(model: nn.Module) -> nn.ModuleList:
    depth = model.config.num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise ValueError(
            f"{type(model).__name__}: no list of {depth} blocks found; its hidden states can't be named"
        )
    return found[0]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
