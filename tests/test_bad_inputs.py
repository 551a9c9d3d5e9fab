"""Bad inputs of every command: one clear line, exit status not 0, nothing lost, nothing left."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sweep import hub as reader
from test_workflow import ROOT, notebook

from headbound import cli

EARLIER = "an earlier result"
SWEEPS = {
    "broken.yaml": "models: [a/b\nsteps: 1",
    "list.yaml": "- a/b\n- c/d",
    "nothing.yaml": "",
    "key.yaml": "models: [a/b]\nsteps: [1]\ndpyte: float32",
    "no-steps.yaml": "models: [a/b]",
    "steps-text.yaml": "models: [a/b]\nsteps: many",
    "steps-words.yaml": "models: [a/b]\nsteps: [one]",
    "models-number.yaml": "models: 5\nsteps: [1]",
    "every-zero.yaml": "models: [a/b]\nevery: -1\nlast: 10",
    "dtype.yaml": "models: [a/b]\nsteps: [1]\ndtype: float33",
    "texts.yaml": "models: [a/b]\nsteps: [1]\ntexts: many",
    "good.yaml": "name: x\nmodels: [a/b]\nsteps: [1]\nwhole: false",
    "good-whole.yaml": "name: x\nmodels: [a/b]\nsteps: [1]",
}


def fill(folder: Path) -> Path:
    """A sound model and text, and what is wrong in one way each."""
    sound = tiny.save(folder / "sound")
    for name in ("half", "nan", "no-tokenizer", "bad-tokenizer", "bad-config", "code", "unknown"):
        shutil.copytree(sound, folder / name)
    (folder / "half" / "model.safetensors").unlink()
    weights = load_file(sound / "model.safetensors")
    weights["lm_head.weight"][3, 3] = torch.nan
    save_file(weights, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (folder / "bad-tokenizer" / "tokenizer.json").write_text("{")
    (folder / "bad-config" / "config.json").write_text("{not json")
    config = json.loads((sound / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "code" / "config.json").write_text(
        json.dumps({**config, **own, "model_type": "mine"})
    )
    (folder / "unknown" / "config.json").write_text(json.dumps({**config, "model_type": "later"}))
    tiny.save(folder / "encoder", "bert")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "empty").mkdir()
    (folder / "bad.gguf").write_bytes(b"GGUX" * 9)
    (folder / "one.safetensors").write_bytes(b"x")
    words = (tiny.TEXT * 40 + "\n\n") * 400
    numbered = (f"{place} {tiny.TEXT * 30}" for place in range(400))
    (folder / "text.txt").write_text("\n\n".join(numbered), encoding="utf-8")
    (folder / "utf16.txt").write_bytes(words[:5000].encode("utf-16"))
    (folder / "latin.txt").write_bytes("ü ".encode("latin-1") * 3000)
    (folder / "nul.txt").write_bytes(words[:5000].encode("utf-16-le"))
    (folder / "void.txt").write_text(" \n\n ")
    (folder / "short.txt").write_text("Too short.")
    (folder / "folder").mkdir()
    (folder / "file").write_text("")
    (folder / "report.html").write_text(EARLIER)
    (folder / "out.ipynb").write_text(EARLIER)
    (folder / "out.csv").write_text(EARLIER)
    for name, content in SWEEPS.items():
        (folder / name).write_text(content)
    for name in ("presets", "notebooks"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "_toc.yml", folder)
    notebook(folder / "fine.ipynb", "print(n)")
    notebook(folder / "fails.ipynb", "raise RuntimeError('on purpose')")
    notebook(folder / "syntax.ipynb", "this is no Python")
    notebook(folder / "dies.ipynb", "import os; os.kill(os.getpid(), 9)")
    notebook(folder / "no-parameters.ipynb", "print(1)", parameters="x = 1")
    content = json.loads((folder / "no-parameters.ipynb").read_text())
    for cell in content["cells"]:
        cell["metadata"] = {}
    (folder / "no-parameters.ipynb").write_text(json.dumps(content))
    notebook(folder / "computed.ipynb", "print(1)", parameters="x = len('abc')")
    (folder / "no-json.ipynb").write_text("{")
    (folder / "no-notebook.ipynb").write_text('{"a": 1}')
    return folder


# Command, and what its line must say. The folder is the one that `fill` makes.
INPUTS = [
    ("nonsense", "No such command 'nonsense'"),
    ("book --presets laptop", "No such option"),
    ("book --cores many", "'--cores': Input should be a valid integer"),
    ("book --preset huge", "PRESET = huge: must be one of"),
    ("book --preset ../presets/laptop", "must be one of"),
    ("book --chapter 42", "chapter = 42: must begin one of"),
    ("book --cores 0", "'--cores': Input should be greater"),
    ("sign --preset huge", "PRESET = huge: must be one of"),
    ("sign --preset smoke", "PRESET=smoke is not signed"),
    ("sign", "chapters are not executed yet"),
    ("check --preset huge", "PRESET = huge: must be one of"),
    ("check", "chapters are not executed yet"),
    ("links --preset huge", "PRESET = huge: must be one of"),
    ("pdf", "no built book"),
    ("chapter", "Missing argument"),
    ("chapter nothing.ipynb out.ipynb", "nothing.ipynb: no such file"),
    ("chapter folder out.ipynb", "no such file"),
    ("chapter no-json.ipynb out.ipynb", "no-json.ipynb: not a notebook"),
    ("chapter no-notebook.ipynb out.ipynb", "no-notebook.ipynb: not a notebook"),
    ("chapter void.txt out.ipynb", "void.txt: not a notebook"),
    ("chapter utf16.txt out.ipynb", "utf16.txt: not a notebook"),
    ("chapter no-parameters.ipynb out.ipynb", "no cell of it is tagged"),
    ("chapter computed.ipynb out.ipynb", "plain values"),
    ("chapter fine.ipynb out.ipynb --set q=1", "unknown parameter 'q'; it has n, share"),
    ("chapter fine.ipynb out.ipynb --set n", "must be NAME=VALUE"),
    ("chapter fine.ipynb out.ipynb --set n=many", "n = 'many': must be of type int"),
    ("chapter fine.ipynb out.ipynb --set share=0.8.0", "share = '0.8.0': must be of type float"),
    ("chapter 03_head_spectrum out.ipynb --preset huge", "PRESET = huge: must be one of"),
    ("chapter fine.ipynb folder", "it is a folder"),
    ("chapter fine.ipynb fine.ipynb", "it is the notebook itself"),
    ("chapter fine.ipynb file/out.ipynb", "name another file"),
    ("chapter fine.ipynb /proc/out.ipynb", "name another file"),
    ("chapter 03_head_spectrum out.ipynb --set seed=-1", "seed: -1 is less than the minimum"),
    ("chapter 01_wind_tunnel out.ipynb --set hidden_sizes=[]", "hidden_sizes: []"),
    ("diagnose", "Missing argument"),
    ("diagnose sound --text text.txt --output report.ipynb", "need a place each"),
    ("diagnose sound --text text.txt --output folder", "it is a folder; name a file"),
    ("diagnose sound --output /proc/x.html", "name another file"),
    ("diagnose sound --json folder", "it is a folder; name a file"),
    ("diagnose sound --json report.html", "need a place each"),
    ("diagnose sound --set learning_rate=0.8.0", "learning_rate = '0.8.0'"),
    ("diagnose sound --set cuts=0.5", "cuts = '0.5': must be of type list"),
    ("diagnose sound --set nonsense=3", "unknown parameter 'nonsense'"),
    ("measure", "Missing argument"),
    ("measure nothing --text text.txt", "model = 'nothing'"),
    (
        "measure nobody/nothing --text text.txt",
        "model = 'nobody/nothing': its config can't be read",
    ),
    ("measure nobody/nothing --revisions step1 --text text.txt", "revision = 'step1'"),
    ("measure sound --revisions step1 --text text.txt", "of Hub ids only, none is given"),
    ("measure a/b/c/d --text text.txt", "model = 'a/b/c/d'"),
    ("measure '' --text text.txt", "model = ''"),
    ("measure empty --text text.txt", "model = 'empty'"),
    ("measure half --text text.txt", "model = 'half'"),
    ("measure nan --text text.txt", "NaN or Inf in lm_head.weight"),
    ("measure no-tokenizer --text text.txt", "its tokenizer can't be read"),
    ("measure bad-tokenizer --text text.txt", "its tokenizer can't be read"),
    ("measure bad-config --text text.txt", "its config can't be read"),
    ("measure code --text text.txt", "code of its own"),
    ("measure unknown --text text.txt", "model = 'unknown'"),
    ("measure encoder --text text.txt", "no LM head"),
    ("measure adapter --text text.txt", "it has an adapter"),
    ("measure bad.gguf --text text.txt", "model = 'bad.gguf'"),
    ("measure one.safetensors --text text.txt", "model = 'one.safetensors'"),
    ("measure text.txt --text text.txt", "model = 'text.txt'"),
    ("measure sound --text nothing.txt", "text = 'nothing.txt': no such file"),
    ("measure sound --text folder", "text = 'folder': no such file"),
    ("measure sound --text latin.txt", "not UTF-8 at byte 0"),
    ("measure sound --text nul.txt", "NUL characters"),
    ("measure sound --text utf16.txt", "not UTF-8 at byte 0"),
    ("measure sound --text void.txt", "void.txt': it has no text"),
    ("measure sound --text short.txt", "the text has only"),
    ("measure sound --text hf:", "text = 'hf:'"),
    ("measure sound --text hf:nobody/nothing", "text = 'hf:nobody/nothing'"),
    ("measure sound --text text.txt --length 100000", "length = 100000"),
    ("measure sound --text text.txt --length 1", "'--length': Input should be greater"),
    ("measure sound --text text.txt --texts 0", "'--texts': Input should be greater"),
    ("measure sound --text text.txt --texts 4 --length 600", "length = 600"),
    ("measure sound --text text.txt --json folder", "it is a folder; name a file"),
    ("measure sound --text text.txt --csv /proc/x.csv", "name another file"),
    ("measure sound nothing --text text.txt --texts 2 --length 16 --csv out.csv", "1 of 2"),
    ("suite --set hidden_sizes=[]", "hidden_sizes: []"),
    ("suite --set hidden_sizes=[0]", "hidden_sizes.0: 0 is less than the minimum"),
    ("suite --set steps=0", "steps"),
    ("suite --set vocab_size=9", "vocab_size"),
    ("suite --set nonsense=1", "unknown parameter 'nonsense'"),
    ("suite --set text=nothing.txt", "text = 'nothing.txt': no such file"),
    *((f"sweep {name}", name) for name in SWEEPS if not name.startswith("good")),
    ("tunnel nothing 8 0", "arm = nothing: must be one of baseline;"),
    ("sweep nothing.yml", "nothing.yml: No such file"),
    ("sweep folder", "folder: Is a directory"),
    ("sweep utf16.txt", "utf16.txt"),
    ("sweep good.yaml nonsense", "give left, or audit or measure"),
    ("sweep good.yaml audit c/d", "give left, or audit or measure"),
    ("sweep good.yaml audit a/b", "a/b"),
    ("sweep good.yaml measure a/b step2", "step2"),
    ("plan nothing.yml", "nothing.yml: No such file"),
    ("plan list.yaml", "list.yaml"),
    ("plan good.yaml", "a/b"),
    ("plan good.yaml --tflops fast", "'--tflops': Input should be a valid number"),
    ("plan good.yaml --tflops 0", "'--tflops': Input should be greater"),
    ("plan good.yaml --jobs -1", "'--jobs': Input should be greater"),
]
# These start a kernel.
EXECUTED = [
    ("chapter fails.ipynb out.ipynb", "fails: RuntimeError: on purpose"),
    ("chapter syntax.ipynb out.ipynb", "syntax: SyntaxError"),
    ("chapter dies.ipynb out.ipynb", "dies: its kernel was killed"),
    ("chapter 03_head_spectrum out.ipynb --set model=nothing", "model = 'nothing'"),
    ("chapter 02_anisotropy out.ipynb --set model=sound --set text=nothing.txt", "nothing.txt"),
    ("chapter 04_target_rank out.ipynb --set text=text.txt --set tokenizer=nothing", "nothing"),
    (
        "chapter 05_rank_constrained_heads out.ipynb --preset smoke --set model=encoder",
        "no LM head",
    ),
    ("diagnose nan --text text.txt", "NaN or Inf in lm_head.weight"),
    ("diagnose adapter --text text.txt", "it has an adapter"),
    ("diagnose sound --text short.txt --set length=32", "the text has only"),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("bad"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tell(command: str, monkeypatch, capfd) -> tuple[int, list[str]]:
    """The exit status, and the lines on standard error but for those of a progress bar."""
    monkeypatch.setattr(sys, "argv", ["headbound", *shlex.split(command)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capfd.readouterr().err.splitlines()
    return ended.value.code, [line for line in lines if line and "%|" not in line]


def check(command, words, filled, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of a kernel; this process has read it already
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HEADBOUND_SWEEP", raising=False)
    monkeypatch.setattr(reader, "WAIT", 0.01)
    monkeypatch.chdir(filled)
    before = contents(filled)
    status, lines = tell(command, monkeypatch, capfd)
    assert status not in (0, None)
    assert len(lines) == 1, lines
    assert lines[0].startswith("headbound: ")
    assert words in lines[0]
    assert contents(filled) == before
    left = [path for path in Path(tmp_path).rglob("*") if path.name.startswith(".")]
    assert not [path for path in left if path.suffix != ".lock"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("command", "words"), INPUTS, ids=[command for command, _ in INPUTS])
def test_one_line(command, words, filled, tmp_path, monkeypatch, capfd):
    check(command, words, filled, tmp_path, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("command", "words"), EXECUTED, ids=[command for command, _ in EXECUTED])
def test_one_line_out_of_a_kernel(command, words, filled, tmp_path, monkeypatch, capfd):
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "workflow")])
    monkeypatch.setenv("PYTHONPATH", paths)
    check(command, words, filled, tmp_path, monkeypatch, capfd)
