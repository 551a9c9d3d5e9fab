"""The real clients talk to the hub of the tests as they talk to the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest
from huggingface_hub import HfApi, errors, hf_hub_download

MODEL = "EleutherAI/pythia-31m"
TASK = """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: " {{end}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
CLIENT = """
import json, sys, torch, lm_eval, lm_eval.tasks
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision="step8", dtype=torch.float32)
binary = AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-70m", revision="step0", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], revision="step8")
ids = tokenizer("the loss of a model", return_tensors="pt").input_ids
tasks = lm_eval.tasks.TaskManager(include_path=".", include_defaults=False)
evaluated = lm_eval.simple_evaluate(
    HFLM(pretrained=sys.argv[1], revision="step8", dtype="float32", device="cpu"),
    tasks=["last_word"], task_manager=tasks, bootstrap_iters=0)
print(json.dumps({"head": model.get_output_embeddings().weight[:2, :3].tolist(), "tokens": len(tokenizer),
    "finite": bool(model(ids).logits.isfinite().all()), "binary": list(binary.lm_head.weight.shape),
    "n": evaluated["n-samples"]["last_word"]["effective"]}))
"""


@pytest.fixture(scope="module")
def suite():
    with hub.serving(steps=(0, 8)) as served:
        yield served


def test_huggingface_hub_lists_and_reads(suite, tmp_path):
    api = HfApi(endpoint=suite.url)
    info = api.model_info(MODEL, revision="step8", files_metadata=True)
    listed = {f.path: f for f in api.list_repo_tree(MODEL, revision="step8", recursive=True)}
    assert {b.name for b in api.list_repo_refs(MODEL).branches} == {"step0", "step8", "main"}
    assert {f.rfilename: (f.blob_id, f.lfs and f.lfs.sha256) for f in info.siblings} == {
        p: (f.blob_id, f.lfs and f.lfs.sha256) for p, f in listed.items()
    }
    assert [
        f.path for f in api.get_paths_info(MODEL, ["config.json", "none"], revision="step8")
    ] == ["config.json"]
    metadata = api.get_safetensors_metadata("EleutherAI/pythia-14m", revision="step8")
    assert metadata.files_metadata["model.safetensors"].tensors["embed_out.weight"].shape == [
        2048,
        32,
    ]
    path = hf_hub_download(
        MODEL, "model-00001-of-00002.safetensors", cache_dir=tmp_path, endpoint=suite.url
    )
    assert Path(path).stat().st_size == listed["model-00001-of-00002.safetensors"].size
    checked = api.verify_repo_checksums(MODEL, cache_dir=tmp_path)
    assert (checked.checked_count, checked.mismatches) == (1, [])


def test_long_listings_come_in_pages():
    with hub.Hub(page=2) as small:
        small.commit("a/b", "main", {f"{i}.json": b"{}" for i in range(5)})
        assert len(list(HfApi(endpoint=small.url).list_repo_tree("a/b"))) == 5


def test_what_is_not_there_has_the_hubs_own_errors(suite):
    api = HfApi(endpoint=suite.url)
    suite.gated.add("EleutherAI/secret")
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info(MODEL, revision="step9")
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("EleutherAI/none")
    with pytest.raises(errors.GatedRepoError):
        api.model_info("EleutherAI/secret")
    assert not api.file_exists(MODEL, "none.json")


@pytest.mark.slow
def test_transformers_and_lm_eval_read_from_it(suite, tmp_path):
    (tmp_path / "task.yaml").write_text(TASK)
    docs = [{"start": "the head of a", "end": "model"}, {"start": "the loss of a", "end": "token"}]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    environment = {
        **os.environ,
        "HF_ENDPOINT": suite.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", CLIENT, MODEL]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    tensors = hub.checkpoint(64, 2048, seed=1001)[1]
    assert seen == {
        "head": tensors["embed_out.weight"][:2, :3].float().tolist(),
        "tokens": 2000,
        "finite": True,
        "binary": [2048, 128],
        "n": 2,
    }
