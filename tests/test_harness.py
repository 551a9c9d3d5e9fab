import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint

from headbound import harness, models
from headbound.train import tunnel

PROSE = (
    "The solver keeps a residual for every equation of the system. When a step makes it smaller, the step is "
    "accepted; otherwise it is halved until the solver finds a smaller residual."
)


def test_a_passage_ends_before_a_word_said_before():
    (found,) = harness.passages([f"Title\n\n{PROSE}\n"])
    assert found["word"] == "residual"
    assert f"{found['context']} residual." == PROSE


@pytest.mark.parametrize(
    "text",
    [
        PROSE.replace("residual for", "value for"),  # not said before
        PROSE.replace(". When", ", and when"),  # one sentence
        PROSE.replace("smaller residual.", "smaller residual: ::"),  # markup
        PROSE.replace("a residual", "a :class:`Residual` residual"),  # a cross-reference
        PROSE.replace("the system", "x[0] = y_ == 2"),  # code
        PROSE.replace("it smaller", "MAXITER_LIMIT smaller").replace("of the system", "MAXVALUES"),
        "\n".join(f"{' ' * i}{line}" for i, line in enumerate(PROSE.split(". "))),  # a list
        "A residual. The residual is the residual.",  # too short
        "",
    ],
)
def test_no_passage(text):
    assert harness.passages([text]) == []


def test_literals_become_words():
    (found,) = harness.passages(
        [PROSE.replace("The solver", "The ``solver``").replace("a step", "a `step`")]
    )
    assert "`" not in found["context"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a suite, and the text its task comes from."""
    folder = tmp_path_factory.mktemp("lmeval")
    rng = np.random.default_rng(0)
    words = ["equation", "residual", "solver", "matrix", "gradient", "estimate", "sample", "kernel"]
    texts = []
    for _ in range(400):
        a, b, c = rng.choice(words, 3, replace=False)
        extra = " ".join(rng.choice(words, 280))
        texts.append(
            f"{PROSE.replace('residual', a).replace('equation', b).replace('solver', c)}\nThe {extra}."
        )
    (folder / "text.txt").write_text("\n\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADBOUND_CACHE", str(folder / "cache"))
        options = {
            "vocab_size": 300,
            "layers": 1,
            "context": 128,
            "batch_size": 2,
            "checkpoints": 1,
        }
        source = str(folder / "text.txt")
        table = tunnel.train([8], 2, folder, source=source, held_out_texts=4, **options)
        yield table.path.iloc[-1], source


def test_the_harness_agrees_with_a_hand_count(small):
    path, source = small
    items = harness.last_words(source)["test"]
    assert len(items) > 3
    model, tokenizer = models.load(path)
    found = harness.evaluate(model, tokenizer, limit=3, source=source).set_index("metric")
    losses, hits = [], 0
    for item in items.select(range(3)):
        context = tokenizer(item["context"])["input_ids"]
        word = tokenizer(f"{item['context']} {item['word']}")["input_ids"][len(context) :]
        rows = torch.tensor([(context + word)[-129:]])
        logits = model(rows[:, :-1]).logits[0]
        each = torch.nn.functional.cross_entropy(logits, rows[0, 1:], reduction="none")
        losses.append(each[-len(word) :].sum().item())
        hits += bool((logits.argmax(1) == rows[0, 1:])[-len(word) :].all())
    perplexity = found.loc["perplexity"]
    assert perplexity["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert perplexity["low"] <= perplexity["value"] <= perplexity["high"]
    assert found.loc["acc", "value"] == pytest.approx(hits / 3)
    assert found.loc["acc", ["low", "high"]].tolist() == pytest.approx(
        proportion_confint(hits, 3, method="wilson")
    )
    assert (found["n"] == 3).all()


def test_the_command_runs_the_task_file_and_agrees(small, tmp_path):
    """lm-eval's own command, from the task file's folder, on a checkpoint folder of the tunnel."""
    path, source = small
    here = harness.evaluate(*models.load(path), limit=5, source=source).set_index("metric")["value"]
    arguments = f"--model hf --model_args pretrained={path},dtype=float32 --device cpu --limit 5"
    command = [Path(sys.executable).with_name("lm_eval"), "run", *arguments.split()]
    command += ["--metadata", json.dumps({"source": source})]
    command += ["--tasks", "docstring_last_word", "--include_path", ".", "--output_path", tmp_path]
    done = subprocess.run(command, cwd=harness.TASKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["docstring_last_word"]
    assert theirs["acc,none"] == here["acc"]
    assert theirs["perplexity,none"] == pytest.approx(here["perplexity"], rel=1e-4)


def test_results_are_kept(small, monkeypatch):
    path, source = small
    model, tokenizer = models.load(path)
    first = harness.evaluate(model, tokenizer, limit=2, source=source)
    monkeypatch.setattr(harness, "_run", lambda *_: pytest.fail("ran again"))
    assert harness.evaluate(model, tokenizer, limit=2, source=source).equals(first)


def test_an_unknown_task(small, monkeypatch):
    # Without the harness's own tasks, whose index takes long to build.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: type("", (), {"all_tasks": []}))
    with pytest.raises(ValueError, match="task = 'lambada_closedai': lm-eval does not know it"):
        harness.evaluate(*models.load(small[0]), tasks=("lambada_closedai",))
