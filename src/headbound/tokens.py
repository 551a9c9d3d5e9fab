"""Texts to streams of token ids: small vocabularies trained on the spot, or a tokenizer file of the reader's."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from headbound.progress import bar
from headbound.text import cache_dir, fingerprint, replacing

END_OF_TEXT = "<|endoftext|>"
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
BATCH = 4096  # texts encoded between two steps of the progress bar


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, trained once and kept in the cache.

    Id 0 is `<|endoftext|>`, as in GPT-NeoX.

    **Raises:** `ValueError` if the vocabulary can't hold the 256 bytes, or the text is too short to fill it.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size = {vocab_size}: a byte-level vocabulary needs at least 257 tokens")
    path = cache_dir() / "tokenizers" / f"bpe-{vocab_size}-{fingerprint(texts)}.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        if tokenizer.get_vocab_size() != vocab_size:
            raise ValueError(
                f"vocab_size = {vocab_size}: the text yields only {tokenizer.get_vocab_size()}; "
                "use more text or a smaller vocabulary"
            )
        with replacing(path) as temporary:
            tokenizer.save(str(temporary))
    return load(path)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder that has one.

    **Raises:** `FileNotFoundError` without the file, `ValueError` if it can't be read.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer = {str(path)!r}: no {file.name} there; give a tokenizer.json or its folder")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"tokenizer = {str(path)!r}: not a tokenizer file ({error})") from error


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that separates texts.

    **Raises:** `ValueError` if the tokenizer has none of the usual end-of-text tokens.
    """
    ids = [tokenizer.token_to_id(token) for token in _ENDS]
    known = [i for i in ids if i is not None]
    if not known:
        raise ValueError(f"the tokenizer has none of {', '.join(_ENDS)}; add an end-of-text token to it")
    return known[0]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Int32[np.ndarray, " tokens"]:
    """All texts as one stream of ids, an end-of-text id after each; kept in the cache, read memory-mapped.

    **Raises:** `ValueError` if there is no text.
    """
    if not len(texts):
        raise ValueError("no text to encode: the list of texts is empty")
    end = end_of_text(tokenizer)
    tokenizer_hash = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    path = cache_dir() / "tokens" / f"{fingerprint(texts)}-{tokenizer_hash}.npy"
    if not path.exists():
        parts = []
        for first in bar(range(0, len(texts), BATCH), "tokens"):
            for encoding in tokenizer.encode_batch_fast(list(texts[first : first + BATCH]), add_special_tokens=False):
                parts.append(np.asarray([*encoding.ids, end], np.int32))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r")
