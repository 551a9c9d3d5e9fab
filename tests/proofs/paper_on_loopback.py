"""The paper preset on one machine: 3 models × 12 revisions from a hub on loopback, killed often.

    make proofs

It executes 03_head_spectrum and 10_pythia as `make book PRESET=paper` does, once unbroken and once killed with
-9 five times at random moments, and compares every result, byte for byte. Takes a quarter of an
hour on two cores. Exit code 0 if equal.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hub  # the tests' own: `make proofs` puts its folder on the path
import nbformat

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ["03_head_spectrum", "10_pythia"]
KILLS = 5


def command(folder: Path) -> list[str]:
    """What `make book PRESET=paper` runs, for two of its chapters."""
    chapters = [part for chapter in CHAPTERS for part in ("--chapter", chapter)]
    return [sys.executable, "-m", "companion.cli", "book", "--preset", "paper", *chapters]


def build(folder: Path, variables: dict[str, str], kills: int, rng: random.Random) -> int:
    """Run to the end, killing it and its children on the way; how often it was killed."""
    done = 0
    while True:
        process = subprocess.Popen(
            command(folder), cwd=folder, env=variables, start_new_session=True
        )
        try:
            code = process.wait(timeout=rng.uniform(15, 60) if done < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            continue
        if code:
            sys.exit(f"the build failed with code {code}")
        return done


def results(folder: Path, cache: Path) -> dict[str, object]:
    """Every result file, and what the chapters show but for times and the caches they name."""
    found: dict[str, object] = {
        p.relative_to(cache).as_posix(): p.read_bytes() for p in cache.rglob("step*.json")
    }
    for chapter in CHAPTERS:
        cells = nbformat.read(folder / f"_build/executed/paper/{chapter}.ipynb", as_version=4).cells
        outputs = [
            o for cell in cells[2:-1] for o in cell.get("outputs", []) if o.output_type != "stream"
        ]
        for output in outputs:
            output.get("data", {}).pop("text/plain", None)  # names objects by their place in memory
        found[chapter] = json.dumps(outputs, sort_keys=True)
    return found


def main() -> int:
    """Build twice and compare."""
    rng, outcomes = random.Random(), []
    scratch = Path(tempfile.mkdtemp(prefix="paper-"))
    sweep = scratch / "sweep.yaml"
    with hub.serving() as server:
        hub.pythia_suite(
            server, {"pythia-1b": 64}, steps=hub.STEPS[:1]
        )  # the model of 03_head_spectrum
        models = ["EleutherAI/pythia-14m", "EleutherAI/pythia-31m", "EleutherAI/pythia-70m"]
        plan = {
            "name": "loopback",
            "models": models,
            "steps": list(hub.STEPS),
            "texts": 16,
            "length": 64,
        }
        sweep.write_text(json.dumps(plan))
        for kills in (0, KILLS):
            folder, cache = scratch / f"killed-{kills}", scratch / f"cache-{kills}"
            subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
            settings = {
                "HEADBOUND_SWEEP": sweep,
                "HEADBOUND_CACHE": cache,
                "HEADBOUND_WAIT": "0.05",
            }
            known = Path.home() / ".cache" / "headbound" / "text"
            if (
                known.is_dir()
            ):  # the docstrings are the same for both; collecting them is not what is shown
                shutil.copytree(known, cache / "text")
            variables = {
                **os.environ,
                **{k: str(v) for k, v in settings.items()},
                "HF_ENDPOINT": server.url,
                "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder / 'workflow'}",
            }
            begin = time.monotonic()
            killed = build(folder, variables, kills, rng)
            outcomes.append(results(folder, cache))
            count = sum(name.startswith("sweeps") for name in outcomes[-1])
            took = f"{time.monotonic() - begin:.0f} s"
            print(f"killed {killed} times: {count} checkpoints measured, {took}", flush=True)
    different = sorted(name for name in outcomes[0] if outcomes[0][name] != outcomes[1].get(name))
    same = not different and len(outcomes[0]) == len(outcomes[1])
    print("identical" if same else f"different: {different}; see {scratch}")
    if same:
        shutil.rmtree(scratch)
    return not same


if __name__ == "__main__":
    sys.exit(main())
