"""Hidden states of every layer: streamed in bounded memory, or stored once for every chapter."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from errno import ENOSPC
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headbound import cache, models
from headbound.cache import replacing
from headbound.progress import bar

Ids = Int[Tensor, "texts length"]
BATCH = 16  # texts in one forward pass
CHUNK = 1 << 14  # tokens whose states are kept at once: what a kill costs at most
_VERIFIED: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


def sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int
) -> Ids:
    """The first `length` tokens of the first `count` texts that have as many: no padding.

    A token that the tokenizer puts before every text (Llama's, Gemma's) comes first and is counted.

    **Raises:** `ValueError` if the texts are too few or too short.
    """
    if count < 1 or length < 2:
        raise ValueError(f"count = {count}, length = {length}: give at least 1 text of 2 tokens")
    rows: list[list[int]] = []
    for text in texts:
        ids = _ids(tokenizer, text)
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            return torch.tensor(rows)
    has = f"the text has only {len(rows)} passages of {length} tokens"
    asked = f"count = {count}, length = {length}"
    raise ValueError(f"{asked}: {has}; give more text, or ask for fewer or shorter ones")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens and what the tokenizer puts before them, not what it puts behind."""
    # Silently: a tokenizer warns of texts that are longer than its model reads.
    found = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids = found["input_ids"]
    added = found["special_tokens_mask"]
    while added and added.pop():
        ids.pop()
    return ids


def _depth(model: nn.Module) -> int:
    """How many blocks the model has; of a model with images or sound, its text part."""
    config = model.config.get_text_config(decoder=True)
    # Where a decoder's configuration counts an encoder too (Bart's), the other name is the encoder.
    return getattr(config, "decoder_layers", None) or config.num_hidden_layers


def layer_names(model: nn.Module) -> list[str]:
    """The names of what `stream` yields: `embeddings`, `block 1` … `block L`, `final norm`."""
    blocks = [f"block {number}" for number in range(1, _depth(model) + 1)]
    return ["embeddings", *blocks, "final norm"]


def stream(
    model: nn.Module, input_ids: Ids, layers: Sequence[int] | None = None
) -> Iterator[Float[Tensor, "layers batch length d"]]:
    """Hidden states batch by batch, on the model's device, in the model's precision.

    Layer 0 is what enters the first block. Layer i is what leaves block i. The last, L + 1 or -1,
    is what enters the head. In most models that is block L after the final norm; in a model without
    one it is block L itself. Only what is asked for is kept (None: all), and nothing behind it is
    computed.

    The states are taken where they arise, for transformers' own lists begin with block 1 in some
    models (Mamba). On first use a batch shows that each block reads what the last one wrote.
    `BATCH` texts at once are tried, halved until they fit in memory.

    **Raises:** `ValueError` for a layer that is not there or can't be verified, NaN or Inf in the
    states, or ids outside the vocabulary; `MemoryError` if not even one text fits.
    """
    places = _places(model, layers)
    _check(model, input_ids)
    batch_size = BATCH
    while len(input_ids):
        batch_size = min(batch_size, len(input_ids))
        states = None
        try:
            states, _ = _caught(model, places, input_ids[:batch_size])
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size == 1:
                text = f"one text of {input_ids.shape[1]} tokens"
                fix = "use shorter texts or a smaller model"
                raise MemoryError(f"no memory for {text}; {fix}") from error
        # Behind the block: the error would keep what fills the memory.
        if states is None:
            batch_size //= 2
            clear_device_cache(garbage_collection=True)
        else:
            yield states
            input_ids = input_ids[batch_size:]


def with_logits(
    model: nn.Module, input_ids: Ids, layers: Sequence[int]
) -> tuple[Float[Tensor, "layers texts length d"], Float[Tensor, "texts length vocab"]]:
    """The states of some layers, as of `stream`, and the logits, from one pass of one batch."""
    places = _places(model, layers)
    _check(model, input_ids)
    return _caught(model, places, input_ids, stop=False)


def store(model: nn.Module, input_ids: Ids) -> Float[np.ndarray, "texts length d"]:
    """What the head reads, kept on disk: a passage is computed once, whoever asks.

    A store belongs to a model (`models.key`) and a length. Its index names the passages by hash.
    States are written before the index, so that a killed process leaves no wrong passage, and the
    finished ones stay.

    **Returns:** float32, read-only, memory-mapped if the passages were stored in this order.

    **Raises:** as `stream`; `OSError` before the work if the disk can't hold what is missing.
    """
    _check(model, input_ids)
    length = input_ids.shape[1]
    names = [cache.key(row.cpu().long().numpy().tobytes()) for row in input_ids]
    rows = dict(zip(names, input_ids, strict=True))
    folder = cache.cache_dir() / "hidden" / f"{models.key(model)}-{length}"
    with cache.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            width, known = _extend(folder, model, rows)
        shape = (len(known), length, width)
        every = np.memmap(folder / "states", np.float32, "r", shape=shape)
    places = {name: place for place, name in enumerate(known)}
    order = [places[name] for name in names]
    end = order[0] + len(order)
    if order == list(range(order[0], end)):
        return every[order[0] : end]
    found = np.asarray(every)[order]
    found.flags.writeable = False
    return found


def _extend(folder: Path, model: nn.Module, rows: dict[str, Tensor]) -> tuple[int, list[str]]:
    """Compute what a store lacks of these passages; the states' width, and all that it then has."""
    index = folder / "index.json"
    width = 0
    known: list[str] = []
    if index.exists():
        width, known = json.loads(index.read_text())
    stored = set(known)
    missing = [name for name in rows if name not in stored]
    length = len(next(iter(rows.values())))
    count = max(1, CHUNK // length)
    for start in bar(range(0, len(missing), count), "hidden states"):
        needed = 4 * (len(missing) - start) * length * width
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")
        some = missing[start : start + count]
        batch = torch.stack([rows[name] for name in some])
        parts = [part[0] for part in stream(model, batch, [-1])]
        states = torch.cat(parts).float().cpu().numpy()
        # Written, not mapped: a full disk is then an error and not the end of the process.
        with (folder / "states").open("ab") as file:
            file.truncate(len(known) * states[0].nbytes)  # what a kill left behind the index
            file.write(states.tobytes())
        width = states.shape[-1]
        known += some
        with replacing(index) as temporary:
            temporary.write_text(json.dumps([width, known]))
    return width, known


def _places(model: nn.Module, layers: Sequence[int] | None) -> list[int]:
    count = len(layer_names(model))
    chosen = list(range(count)) if layers is None else list(layers)
    known = range(-count, count)
    if not chosen or not set(chosen) <= set(known):
        last = count - 1
        raise ValueError(f"layers = {chosen}: choose from 0 to {last} (-1 is the last)")
    return [layer % count for layer in chosen]


def _check(model: nn.Module, input_ids: Tensor) -> None:
    if not input_ids.numel():
        raise ValueError("no tokens: give at least one text of one")
    low, high = (int(end) for end in input_ids.aminmax())
    rows = model.get_input_embeddings().num_embeddings
    if low < 0 or high >= rows:
        vocabulary = f"the model's vocabulary of {rows}; use its tokenizer"
        raise ValueError(f"token ids from {low} to {high}: outside {vocabulary}")


class _EnoughError(Exception):
    """Raised inside a forward pass once all that was asked for is caught."""


@torch.inference_mode()
def _caught(
    model: nn.Module, places: Sequence[int], input_ids: Tensor, stop: bool = True
) -> tuple[Float[Tensor, "layers texts length d"], Tensor | None]:
    """The states at `places`, as numbered in `stream`, and what comes out.

    With `stop` the pass ends as soon as all are caught, and nothing comes out. The output of a
    model without a head is its last state.
    """
    batch = input_ids.to(model.device)
    head = model.get_output_embeddings()
    behind = _depth(model) + 1
    blocks = _blocks(model, batch) if min(places) < behind else []
    found: dict[int, Tensor] = {}

    def keep(place: int, passed: Any) -> None:
        found[place] = _states(model, passed, batch).clone()
        if stop and found.keys() >= set(places):
            raise _EnoughError

    def entering(place: int, _module: nn.Module, passed: tuple, named: dict) -> None:
        keep(place, [*passed, *named.values()])

    def leaving(place: int, _module: nn.Module, _passed: tuple, output: Any) -> None:
        keep(place, output)

    output = None
    with ExitStack() as hooks, suppress(_EnoughError):
        for place in set(places) - {0, behind}:
            hook = partial(leaving, place)
            hooks.enter_context(blocks[place - 1].register_forward_hook(hook))
        for place, module in {0: next(iter(blocks), None), behind: head}.items():
            if place in places and module is not None:
                hook = partial(entering, place)
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        output = model(batch, use_cache=False)[0]
        if head is None:
            found[behind] = output
    if not found.keys() >= set(places):
        raise _unnamed(model, "its blocks or its head are not called as modules")
    return _stacked([found[place] for place in places]), output


def _stacked(found: list[Tensor]) -> Float[Tensor, "layers texts length d"]:
    widths = [states.shape[-1] for states in found]
    if len(set(widths)) > 1:
        raise ValueError(f"layers: they differ in width, {widths}; ask for them one by one")
    states = torch.stack(found)
    if not torch.isfinite(states).all():
        raise ValueError("NaN or Inf in the hidden states; run the model in float32")
    return states


def _unnamed(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"{type(model).__name__}: {why}; its hidden states can't be named")


def _states(model: nn.Module, passed: Any, batch: Tensor) -> Float[Tensor, "texts length d"]:
    """The first tensor among what a module was given or gave: a state for each token."""
    parts = [passed] if isinstance(passed, Tensor) else passed
    tensors = [part for part in parts if isinstance(part, Tensor)]
    states = tensors[0] if tensors else None
    shape = () if states is None else tuple(states.shape)
    expected = tuple(batch.shape)
    if len(shape) != 3 or shape[:2] != expected:
        raise _unnamed(model, f"states of shape {shape} for texts × tokens {expected}")
    return states


@torch.inference_mode()
def _blocks(model: nn.Module, input_ids: Tensor) -> list[nn.Module]:
    """The model's blocks, verified: each is called once, and reads what the last one wrote."""
    if model in _VERIFIED:
        return _VERIFIED[model]
    depth = _depth(model)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    batch = input_ids[: 1 if input_ids.shape[1] == 2 else 2, :16].to(model.device)
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def keep(module: nn.Module, passed: tuple, named: dict, output: Any) -> None:
        entered = _states(model, [*passed, *named.values()], batch)
        left = _states(model, output, batch)
        calls.setdefault(module, []).append((entered.clone(), left.clone()))

    for blocks in lists:
        calls.clear()
        with ExitStack() as hooks:
            for block in blocks:
                hooks.enter_context(block.register_forward_hook(keep, with_kwargs=True))
            model(batch, use_cache=False)
        if list(calls) == list(blocks) and all(len(found) == 1 for found in calls.values()):
            break
    else:
        raise _unnamed(model, f"no list of {depth} blocks found that run one after another")
    chain = [found[0] for found in calls.values()]
    for number, ((_, left), (entered, _)) in enumerate(pairwise(chain), 1):
        # Up to a factor: RWKV halves the states now and then, which half precision needs.
        factor = (left * entered).sum() / left.square().sum().clamp(min=1e-30)
        if (entered - factor * left).norm() > 1e-3 * entered.norm():
            wrote = f"what block {number} wrote"
            raise _unnamed(model, f"block {number + 1} does not read {wrote}")
    _VERIFIED[model] = list(blocks)
    return _VERIFIED[model]
