import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from statsmodels.stats.proportion import proportion_confint

from headbound import harness, models
from headbound.measure.saturation import detect
from headbound.train import tunnel

SPEC = importlib.util.spec_from_file_location("last_words", harness.TASKS / "last_words.py")
last_words = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(last_words)
SHARED = Path(harness.__file__).parents[3] / "shared" / "pythia"
PROSE = (
    "The solver keeps a residual for every equation of the system. When a step makes it smaller, the step is "
    "accepted; otherwise it is halved until the solver finds a smaller residual."
)


def test_a_passage_ends_before_a_word_said_before():
    found = last_words._passage(f"Title\n\n{PROSE}\n")
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
    assert last_words._passage(text) is None


def test_literals_become_words():
    found = last_words._passage(
        PROSE.replace("The solver", "The ``solver``").replace("a step", "a `step`")
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
        table = tunnel.train([8], 2, source=source, held_out_texts=4, **options)
        yield table.path.iloc[-1], source


def test_the_harness_agrees_with_a_hand_count(small):
    path, source = small
    items = last_words.last_words(source)["test"]
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


@pytest.mark.slow
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


def test_a_standard_error_that_is_none_gives_no_interval(small):
    path, source = small
    model, tokenizer = models.load(path)
    found = harness.evaluate(model, tokenizer, limit=1, source=source).set_index("metric")
    assert math.isnan(found.loc["perplexity", "low"])
    for error in ("N/A", None, [1], math.nan):
        results = {"word_perplexity,none": 30.0, "word_perplexity_stderr,none": error}
        ((metric, _, value, known),) = harness._numbers(results)
        assert np.isnan(harness._interval(metric, value, known, 5, [])).all()
    assert harness._interval("bits_per_byte", 1.0, 0.5, 5, []) == (1 - 0.98, 1 + 0.98)


def test_a_tokenizer_without_end_is_evaluated_and_left_as_it_was(small):
    path, source = small
    model, tokenizer = models.load(path)
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    before = bare.backend_tokenizer.to_str()
    assert bare.eos_token is None
    whole = harness.evaluate(model, tokenizer, limit=2, source=source)
    assert harness.evaluate(model, bare, limit=2, source=source)["value"].tolist() == (
        whole["value"].tolist()
    )
    assert bare.backend_tokenizer.to_str() == before
    assert bare.pad_token is None


def old(folder, step, acc, task="lambada_openai", model="pythia-v1.1-70m", shots=0, **more):
    metrics = {"acc": acc, "acc_stderr": 0.005, **more}
    arguments = f"use_accelerate=True,pretrained=EleutherAI/{model},revision=step{step}"
    content = {
        "results": {task: metrics},
        "versions": {task: 0},
        "config": {"model": "hf-causal", "model_args": arguments, "num_fewshot": shots},
    }
    return write(Path(folder) / f"{model}_step{step}.json", content)


def new(folder, step, acc, task="lambada_openai", model="org/other-31m", **more):
    metrics = {"alias": task, "acc,none": acc, "acc_stderr,none": 0.005, **more}
    content = {
        "results": {task: metrics},
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "config": {"model": "hf", "model_args": {"pretrained": model, "revision": f"step{step}"}},
    }
    return write(
        Path(folder) / model.replace("/", "__") / f"results_2026-01-01T00-00-{step:02}.1.json",
        content,
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_both_harnesses_in_one_table(tmp_path):
    old(tmp_path / "a" / "zero-shot", 1000, 0.1234567890123456)
    new(tmp_path / "b", 20, 0.25, **{"perplexity,none": 30.5, "perplexity_stderr,none": "N/A"})
    table = harness.read_results(tmp_path)
    assert list(table.columns) == ["model", "step", "task", "metric", "value", "stderr"]
    assert [
        tuple(row) for row in table[["model", "step", "task", "metric", "value"]].to_numpy()
    ] == [
        ("other-31m", 20, "lambada_openai", "acc", 0.25),
        ("other-31m", 20, "lambada_openai", "perplexity", 30.5),
        ("pythia-70m", 1000, "lambada_openai", "acc", 0.1234567890123456),
    ]
    assert np.isnan(table["stderr"].iloc[1])


def test_a_local_checkpoint_folder_names_model_and_step(tmp_path):
    content = {
        "results": {"t": {"acc,none": 0.5}},
        "config": {"model_args": "pretrained=suite/d032/step64"},
    }
    write(tmp_path / "results_2026.json", content)
    table = harness.read_results(tmp_path)
    assert list(zip(table["model"], table["step"], strict=True)) == [("d032", 64)]


def test_another_filter_stays_in_the_metrics_name(tmp_path):
    new(
        tmp_path,
        1,
        0.5,
        **{"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
    )
    row = harness.read_results(tmp_path).set_index("metric").loc["exact_match,strict-match"]
    assert (row["value"], row["stderr"]) == (0.25, 0.1)


def test_tasks_of_one_step_may_lie_in_several_files_and_other_json_is_passed_over(tmp_path):
    old(tmp_path / "x", 5, 0.5)
    old(tmp_path / "y", 5, 0.6, task="sciq")
    write(tmp_path / "config.json", {"hidden_size": 3})
    write(tmp_path / "list.json", [1])
    assert list(harness.read_results(tmp_path)["task"]) == ["lambada_openai", "sciq"]


def broken(folder):
    old(folder, 1, 0.5).write_text('{"results": {')


def twice(folder):
    old(folder / "a", 1, 0.5)
    old(folder / "b", 1, 0.5)


def mixed(folder):
    old(folder, 1, 0.5, model="other-31m")
    new(folder, 2, 0.5, model="EleutherAI/other-31m")


def mixed_shots(folder):
    old(folder, 1, 0.5)
    old(folder, 2, 0.5, shots=5)


def stepless(folder):
    write(
        folder / "opt.json",
        {"results": {"t": {"acc": 1.0}}, "config": {"model_args": "pretrained=opt"}},
    )


def contradictory(folder):
    old(folder, 1, 0.5, model="step2/other-31m")


def nameless(folder):
    result(folder, 1, "/step1")


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (broken, "step1.json: broken JSON"),
        (twice, "pythia-70m lambada_openai 1 acc: .* but .*; keep one"),
        (mixed, "lm-eval 0.4.* but lm-eval before 0.4"),
        (mixed_shots, "0 shots .* 5 shots"),
        (stepless, "opt.json: no step"),
        (contradictory, r"steps \[1, 2\]"),
        (nameless, "no model"),
        (lambda folder: None, "no lm-eval result file"),
    ],
)
def test_bad_results_are_named(tmp_path, plant, message):
    plant(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        harness.read_results(tmp_path)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="Pythia's published evaluations do not lie beside the repository"
)
def test_pythia_saturates_on_lambada_below_410m_only(tmp_path):
    for path in SHARED.rglob("zero-shot/*.json"):
        link = tmp_path / path.relative_to(SHARED)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    table = harness.read_results(tmp_path)
    assert len(table) == 37_152
    curves = table.groupby(["model", "task", "metric"])["step"].nunique()
    assert (curves == table["step"].nunique()).all()
    for path in sorted(SHARED.rglob("zero-shot/*step143000.json")):
        results = json.loads(path.read_text())["results"]
        model = path.parents[1].name
        rows = table[(table["model"] == model) & (table["step"] == 143_000)]
        for row in rows.itertuples():
            assert row.value == results[row.task][row.metric]
            assert row.stderr == results[row.task][f"{row.metric}_stderr"]
    best = {}
    curves = table[(table["task"] == "lambada_openai") & (table["metric"] == "acc")]
    for model, curve in curves.groupby("model"):
        result = detect(curve["step"], curve["value"], curve["stderr"])
        if result.p_value < 0.01:
            best[model] = result.best_step
    assert best == {"pythia-70m": 53_000, "pythia-160m": 63_000}


SOURCES = {
    "a branch": ("EleutherAI/pythia-160m", "step1000", ("pythia-160m", 1000)),
    "a folder": ("/ckpt/pythia160m/step1000", "", ("pythia160m", 1000)),
    "global_step": ("/ckpt/pythia160m/global_step1000", "", ("pythia160m", 1000)),
    "an export folder": ("/ckpt/small/step1000/hf", "", ("small", 1000)),
    "a step in the name": ("/ckpt/olmo-1b_step60900-hf", "", ("olmo-1b", 60_900)),
    "step 0": ("org/model", "step0", ("model", 0)),
    "another system's path": ("C:\\runs\\mine\\step500", "", ("mine", 500)),
}


def result(folder, number, source, revision="", acc=0.5):
    content = {
        "results": {"sciq": {"alias": "sciq", "acc,none": acc, "acc_stderr,none": "N/A"}},
        "config": {"model_args": {"pretrained": source, "revision": revision}},
    }
    return write(folder / f"{number}" / "results_2026-01-01T00-00-00.json", content)


@pytest.mark.parametrize("kind", SOURCES)
def test_model_and_step_of_what_was_evaluated(tmp_path, kind):
    source, revision, expected = SOURCES[kind]
    result(tmp_path, 1, source, revision)
    (row,) = harness.read_results(tmp_path).itertuples()
    assert (row.model, row.step) == expected
    assert math.isnan(row.stderr)


def test_models_that_end_alike_are_not_one_curve(tmp_path):
    result(tmp_path, 1, "here/model", "step1")
    result(tmp_path, 2, "there/model", "step2")
    with pytest.raises(ValueError, match=r"model: .*here/model.* but .*there/model.*; keep one"):
        harness.read_results(tmp_path)


def test_two_stages_of_one_model_are_not_one_curve(tmp_path):
    result(tmp_path, 1, "org/model", "stage1-step-100")
    result(tmp_path, 2, "org/model", "stage2-step-200")
    with pytest.raises(ValueError, match=r"model.*stage1.* in .* but .*stage2.* in .*; keep one"):
        harness.read_results(tmp_path)


@pytest.mark.parametrize(
    "name", ["step1k", "step-10K", "step_1M", "step1e5", "step1_000", "step1,000", "step1000.5"]
)
def test_a_step_that_is_no_whole_number_is_not_read_as_a_smaller_one(tmp_path, name):
    result(tmp_path, 1, f"/runs/mine/{name}")
    with pytest.raises(ValueError, match="no step in its model_args"):
        harness.read_results(tmp_path)


FIRST_AND_SECOND = {
    "behind the step": (("/r/olmo_step1-seed-1", ""), ("/r/olmo_step2-seed-2", "")),
    "a folder behind": (("/r/olmo/step1/sft", ""), ("/r/olmo/step2/hf", "")),
    "a branch": (("org/m", "stage2-ingredient1-step1"), ("org/m", "stage2-ingredient2-step2")),
}


@pytest.mark.parametrize("kind", FIRST_AND_SECOND)
def test_two_forms_of_a_model_are_not_one_curve(tmp_path, kind):
    first, second = FIRST_AND_SECOND[kind]
    result(tmp_path, 1, *first)
    result(tmp_path, 2, *second)
    with pytest.raises(ValueError, match=r": .* in .*, but .* in .*; keep one"):
        harness.read_results(tmp_path)


ASKED = [
    {"config": {"model_args": "pretrained=/r/m/step2,peft=/a/lora"}},
    {"config": {"model_args": "pretrained=/r/m/step2,load_in_8bit=True"}},
    {"config": {"model_args": "pretrained=/r/m/step2", "limit": 10}},
    {"config": {"model_args": "pretrained=/r/m/step2"}, "chat_template": "{{ messages }}"},
]


@pytest.mark.parametrize("second", ASKED, ids=["adapter", "quantised", "limit", "chat"])
def test_a_model_that_was_changed_or_asked_otherwise_is_another_curve(tmp_path, second):
    result(tmp_path, 1, "/r/m/step1")
    write(tmp_path / "2" / "r.json", {"results": {"sciq": {"acc,none": 0.5}}, **second})
    with pytest.raises(ValueError, match="keep one"):
        harness.read_results(tmp_path)


def test_the_step_may_stand_in_a_subfolder_an_adapter_or_a_file(tmp_path):
    for name in ("subfolder", "peft", "gguf_file"):
        folder = tmp_path / name
        for step in (10, 20):
            config = {"model_args": {"pretrained": "org/m", name: f"step{step}", "delta": None}}
            content = {"results": {"sciq": {"acc,none": 0.5}}, "config": config}
            write(folder / str(step) / "r.json", content)
        table = harness.read_results(folder)
        assert list(zip(table["model"], table["step"], strict=True)) == [("m", 10), ("m", 20)]


def test_arguments_that_decide_nothing_part_no_curve(tmp_path):
    for step, more in ((1, ""), (2, ",use_accelerate=True")):
        arguments = f"pretrained=EleutherAI/pythia-70m,revision=step{step}{more}"
        content = {"results": {"sciq": {"acc": 0.5}}, "config": {"model_args": arguments}}
        write(tmp_path / f"{step}.json", content)
    assert set(harness.read_results(tmp_path)["step"]) == {1, 2}


def test_a_mark_at_the_start_odd_arguments_and_a_folder_named_like_a_file(tmp_path):
    result(tmp_path, 1, "/r/m/step1")
    (tmp_path / "folder.json").mkdir()
    marked = tmp_path / "1" / "results_2026-01-01T00-00-00.json"
    marked.write_text("\ufeff" + marked.read_text(), encoding="utf-8")
    assert set(harness.read_results(tmp_path)["step"]) == {1}
    content = {"results": {"sciq": {"acc,none": 0.5}}, "config": {"model_args": ["m"]}}
    write(tmp_path / "odd.json", content)
    with pytest.raises(ValueError, match=r"odd.json: no step in its model_args"):
        harness.read_results(tmp_path)


NAMES = strategies.text("abcxyz01-.", min_size=1, max_size=6).map(lambda name: f"m{name}e")
FORMS = [
    "/{}/step{}",
    "/{}/global_step{}/hf",
    "org/{}|step{}",
    "/{}_step{}-hf",
]


@hypothesis.given(
    strategies.lists(
        strategies.tuples(NAMES, strategies.integers(0, 10**6), strategies.booleans()),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[:2],
    ),
    strategies.sampled_from(FORMS),
)
def test_no_folder_of_results_joins_two_models(rows, form):
    with tempfile.TemporaryDirectory() as name:
        for number, (model, step, new) in enumerate(rows):
            source, _, revision = form.format(model, step).partition("|")
            arguments = f"pretrained={source}" + (f",revision={revision}" if revision else "")
            metrics = {"acc,none": number} if new else {"acc": number}
            content = {"results": {"t": metrics}, "config": {"model_args": arguments}}
            write(Path(name) / str(number) / "result.json", content)
        kinds = {model: {new for other, _, new in rows if other == model} for model, *_ in rows}
        if any(len(found) == 2 for found in kinds.values()):  # one model by both harnesses
            with pytest.raises(ValueError, match="keep one"):
                harness.read_results(name)
            return
        table = harness.read_results(name)
    of = {row.value: (row.model, row.step) for row in table.itertuples()}
    for i, (model, step, _) in enumerate(rows):
        assert of[i][1] == step
        for j, (other, _, _) in enumerate(rows):
            assert (of[i][0] == of[j][0]) == (model == other)
