"""Random models of a few kilobytes, one of each architecture the book meets, with a tokenizer that fits them."""

import json
from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "the quick brown fox jumps over the lazy dog; to be or not to be, that is the question. "
VOCAB = 270  # the tokenizer's; the models' heads have 7 padding rows more
COMMON = {"vocab_size": VOCAB + 7, "bos_token_id": 0, "eos_token_id": 0}
ROTARY = {
    **COMMON,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, n_positions=64, **COMMON
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**ROTARY),
    "llama": lambda: transformers.LlamaConfig(**ROTARY),
    "gemma": lambda: transformers.GemmaConfig(num_key_value_heads=1, head_dim=8, **ROTARY),
    "gemma2": lambda: transformers.Gemma2Config(
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.02, **ROTARY
    ),
    "granite": lambda: transformers.GraniteConfig(logits_scaling=8.0, **ROTARY),
    "gptj": lambda: transformers.GPTJConfig(
        n_embd=16, n_layer=3, n_head=2, rotary_dim=4, n_positions=64, **COMMON
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        **COMMON,
    ),
    "bert": lambda: transformers.BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        vocab_size=VOCAB + 7,
    ),
}


def tokenizer(texts: Iterable[str] = (TEXT, TEXT, TEXT), vocab: int = VOCAB) -> Tokenizer:
    """A byte-level BPE of exactly these many tokens; number 0 ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def network(kind: str, tied: bool = False, seed: int = 0) -> torch.nn.Module:
    config = CONFIGS[kind]()
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
        made = auto.from_config(config)
        for name, weight in made.named_parameters():
            if (
                "norm" in name.lower() or "ln" in name
            ):  # norms that do something, told apart from none
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return made.eval()


def fast_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), eos_token="<|endoftext|>"
    )


def save(folder: Path, kind: str = "llama", tied: bool = False, **options) -> Path:
    network(kind, tied).save_pretrained(folder, **options)
    fast_tokenizer().save_pretrained(folder)
    return folder


def save_gguf(path: Path) -> torch.nn.Module:
    """The Llama as one file in llama.cpp's format. (Its queries and keys lack that format's reordering.)"""
    made, named = network("llama"), tokenizer()
    padding = [f"<pad{i}>" for i in range(made.config.vocab_size - VOCAB)]
    vocabulary = sorted(named.get_vocab(), key=named.token_to_id)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(made.config.max_position_embeddings)
    writer.add_embedding_length(made.config.hidden_size)
    writer.add_block_count(made.config.num_hidden_layers)
    writer.add_feed_forward_length(made.config.intermediate_size)
    writer.add_head_count(made.config.num_attention_heads)
    writer.add_layer_norm_rms_eps(made.config.rms_norm_eps)
    writer.add_vocab_size(made.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary + padding)
    writer.add_token_types(
        [
            3 if token.startswith("<") and token.endswith(">") else 1
            for token in vocabulary + padding
        ]
    )
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(named.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, made.config.num_hidden_layers)
    for name, weight in made.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def starting_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One that puts its first token before every text, as Llama's and Gemma's do."""
    made = tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>")
