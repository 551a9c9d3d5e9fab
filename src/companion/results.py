"""What the executed chapters found, joined with the paper's claims and held against the signed verdicts."""

import argparse
import base64
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml

from companion.execute import literals

CLAIMS, SIGNED = Path("book/claims.yaml"), Path("book/verdicts.yaml")
VERDICTS = {True: "reproduced", False: "not reproduced", None: "not testable here"}
EXEMPT = {
    "smoke"
}  # its numbers mean nothing, so neither do its verdicts: only its keys are checked
SIGNED_HEADER = """\
# The verdicts that someone looked at and signed, preset by preset: `make sign PRESET=…` writes what the chapters
# now say, and the diff of this file is what there is to review. A list holds every verdict that is fine, for findings
# that rest on what a machine may lack, such as a network; `absent` in it lets the whole finding be missing.
"""


class Chapter(NamedTuple):
    """What one executed notebook says of itself."""

    name: str
    title: str
    parameters: dict[str, Any]
    findings: list[dict[str, Any]]
    figures: dict[str, dict[str, Any]]
    provenance: dict[str, str]
    run: dict[str, Any]
    question: str = ""


def read(path: Path) -> Chapter:
    """Collect findings, figures and provenance from the metadata of a notebook's outputs."""
    content = nbformat.read(path, as_version=4)
    heading = next(
        line for cell in content.cells for line in cell.source.splitlines() if line.startswith("# ")
    )
    parameters, findings, figures, provenance = {}, [], {}, {}
    for cell in content.cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            parameters |= literals(cell.source)
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("headbound", {})
            findings += about.get("findings", [])
            provenance |= about.get("provenance", {})
            if "alt" in about and "image/png" in output.get("data", {}):
                figures[about["name"]] = {
                    **about,
                    "png": base64.b64decode(output["data"]["image/png"]),
                }
    run = {**content.metadata.get("papermill", {}), **content.metadata.get("headbound", {})}
    asked = re.findall(r"[^.?!]*\?", " ".join(content.cells[0].source.split("\n", 1)[-1].split()))
    question = run.get("question") or (asked[0].strip() if asked else "")
    return Chapter(
        path.stem, heading[2:].strip(), parameters, findings, figures, provenance, run, question
    )


def verdict(finding: dict[str, Any]) -> str:
    """One of three words."""
    return VERDICTS[finding["agrees"]]


def measured(value: dict[str, Any] | float | str | None) -> str:
    """A finding's number as the chapters print it, with interval and sample size where it has them."""
    from headbound.stats import Estimate  # scipy behind it takes a second

    if isinstance(value, dict):
        return str(Estimate(**{name: math.nan if v is None else v for name, v in value.items()}))
    return (
        f"{value:.4g}" if isinstance(value, float) else "unknown" if value is None else str(value)
    )


def overall(verdicts: list[str]) -> str:
    """One word for a claim that several findings answer."""
    told = set(verdicts) - {VERDICTS[None]}
    return "divided" if len(told) > 1 else told.pop() if told else VERDICTS[None]


def load_claims() -> dict[str, Any]:
    """The paper's claims; none where the book has no such file."""
    return yaml.safe_load(CLAIMS.read_text()) if CLAIMS.exists() else {"front": [], "sections": []}


def load_signed() -> dict[str, dict[str, str | list[str]]]:
    """The signed verdicts of every preset."""
    return (yaml.safe_load(SIGNED.read_text()) or {}) if SIGNED.exists() else {}


def _fine(words: str | list[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def faults(preset: str, chapters: list[Chapter]) -> list[str]:
    """What stands between these results and the book, a line each: verdicts that changed, keys that went or came."""
    where = {f["key"]: (chapter.name, verdict(f)) for chapter in chapters for f in chapter.findings}
    keys = [f["key"] for chapter in chapters for f in chapter.findings]
    found = [
        f"{key}: two findings have this key; rename one"
        for key in sorted(set(keys))
        if keys.count(key) > 1
    ]
    all_signed, claims = load_signed(), load_claims()
    optional = {
        key
        for signed in all_signed.values()
        for key, words in signed.items()
        if "absent" in _fine(words)
    }
    for claim in (claim for section in claims["sections"] for claim in section["claims"]):
        for key in set(claim.get("findings", [])) - where.keys() - optional:
            found.append(
                f"{CLAIMS}: claim {claim['id']}: no chapter has the finding {key}; correct one or the other"
            )
    if preset in EXEMPT or not claims["sections"]:
        return found
    fix = f"look at it, then `make sign PRESET={preset}` and commit {SIGNED}"
    signed = all_signed.get(preset)
    if not signed:
        return [
            *found,
            f"PRESET={preset} has no signed verdicts yet ({len(where)} findings): {fix}",
        ]
    for key in sorted(signed.keys() | where.keys()):
        name, now = where.get(key, ("no chapter", "absent"))
        before = signed.get(key)
        if before is None:
            found.append(f"{key} ({name}): a new finding, {now}: {fix}")
        elif now not in _fine(before):
            found.append(
                f"{key} ({name}): the verdict was {' or '.join(_fine(before))}, now it is {now}: {fix}"
            )
    return found


def sign(preset: str, chapters: list[Chapter]) -> int:
    """Write the verdicts as they are now; a list that covers the present verdict stays. Returns how many changed."""
    now = {f["key"]: verdict(f) for chapter in chapters for f in chapter.findings}
    everything = load_signed()
    before = everything.get(preset, {})
    now |= {
        key: "absent"
        for key, words in before.items()
        if "absent" in _fine(words) and key not in now
    }
    after = {
        key: before[key] if word in _fine(before.get(key, [])) else word
        for key, word in sorted(now.items())
    }
    everything[preset] = after
    text = SIGNED_HEADER + yaml.safe_dump(
        everything, allow_unicode=True, default_flow_style=None, width=200
    )
    unfinished = SIGNED.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.replace(SIGNED)
    return sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())


def main() -> int:
    """The command line of `make sign`."""
    parser = argparse.ArgumentParser(
        description="Sign the verdicts of the chapters executed under a preset."
    )
    parser.add_argument("--preset", required=True)
    preset = parser.parse_args().preset
    names = yaml.safe_load(Path(f"presets/{preset}.yaml").read_text())
    paths = [Path("_build/executed") / preset / f"{name}.ipynb" for name in names]
    missing = [path.stem for path in paths if not path.exists()]
    if preset in EXEMPT or missing:
        reason = (
            "numbers mean nothing"
            if preset in EXEMPT
            else f"chapters are not all executed ({', '.join(missing)})"
        )
        print(f"headbound: PRESET={preset} is not signed: its {reason}", file=sys.stderr)
        return 1
    changed = sign(preset, [read(path) for path in paths])
    print(
        f"{SIGNED}: {changed} verdicts of PRESET={preset} changed; read `git diff {SIGNED}`, then commit it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
