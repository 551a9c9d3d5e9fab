"""What the executed chapters found, joined with the paper's claims, beside the signed verdicts."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml

from companion import execute

CLAIMS, SIGNED = Path("book/claims.yaml"), Path("book/verdicts.yaml")
TEXTS = Path("book/words")  # a file a chapter, with the words of its findings
EXEMPT = {"smoke"}  # its numbers mean nothing, so neither do its verdicts
WORDS = ("reproduced", "consistent", "in part", "divided", "not reproduced", "not testable here")


class Chapter(NamedTuple):
    """What one executed notebook says of itself."""

    name: str
    title: str
    question: str
    answer: str
    parameters: dict[str, Any]
    findings: list[dict[str, Any]]
    figures: dict[str, dict[str, Any]]
    provenance: dict[str, str]
    packages: dict[str, str]
    run: dict[str, Any]

    @property
    def made(self) -> dict[str, str]:
        """On what its verdicts rest, by the reason that a change of it would be."""
        given = {key: value for key, value in self.parameters.items() if key != "preset"}
        digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
        packages = [f"{name} {version}" for name, version in self.packages.items()]
        return {
            "other parameters": digest[:8],
            "a change of the notebook": self.run.get("source", "unknown")[:8],
            "other versions of packages": ", ".join(packages),
            "another device": self.provenance.get("device", "unknown"),
        }


class Row(NamedTuple):
    """A claim, the findings that answer it with their chapters, and one word for them all."""

    claim: dict[str, Any]
    pairs: list[tuple[Chapter, dict[str, Any]]]
    verdict: str


class Change(NamedTuple):
    """A verdict that is not the signed one."""

    key: str
    chapter: str
    signed: str
    now: str
    reason: str

    def __str__(self) -> str:
        """One line for the terminal."""
        told = f"{self.key} ({self.chapter}): signed {self.signed}, here {self.now}"
        return f"{told}; likely because of {self.reason}"


def read(path: Path) -> Chapter:
    """Collect what an executed notebook says of itself."""
    return collect(nbformat.read(path, as_version=4), path.stem)


def collect(content: nbformat.NotebookNode, name: str) -> Chapter:
    """The same of a notebook that is read already."""
    title, _, opening = content.cells[0].source.partition("\n")
    asked = re.search(r"[^.?!]*\?", " ".join(opening.split()))
    findings = []
    figures = {}
    kept = {}
    for _, output, about in execute.outputs(content.cells):
        kept |= about
        findings += about.get("findings", [])
        if "alt" in about and "image/png" in output.get("data", {}):
            png = base64.b64decode(output["data"]["image/png"])
            figures[about["name"]] = {**about, "png": png}
    own = content.metadata.get("companion", {})
    return Chapter(
        name=name,
        title=title.removeprefix("# ").strip(),
        question=own.get("question") or (asked[0].strip() if asked else ""),
        answer=kept.get("answer", ""),
        parameters=execute.parameters(content),
        findings=findings,
        figures=figures,
        provenance=kept.get("provenance", {}),
        packages=kept.get("packages", {}),
        run={**content.metadata.get("papermill", {}), **own},
    )


def overall(verdicts: Sequence[str]) -> str:
    """One word for a claim that several findings answer.

    A claim of several parts is reproduced only if every part is:
    a part that can't be tested makes it `in part`, a part that is not reproduced `divided`.
    """
    told = set(verdicts)
    good = told & {"reproduced", "consistent"}
    if good and "not reproduced" in told:
        return "divided"
    if good and "not testable here" in told:
        return "in part"
    order = ("not reproduced", "consistent", "reproduced")
    return next((word for word in order if word in told), "not testable here")


def load(path: Path) -> dict[str, Any]:
    """The claims of the paper or the signed verdicts; nothing where the book has no such file."""
    return (yaml.safe_load(path.read_text("utf-8")) or {}) if path.exists() else {}


def join(claims: dict[str, Any], chapters: Sequence[Chapter]) -> list[tuple[dict, list[Row]]]:
    """Each section of the claims with its rows; a finding that no chapter has is not testable."""
    by_key = {f["key"]: (chapter, f) for chapter in chapters for f in chapter.findings}
    sections = []
    for section in claims.get("sections", []):
        rows = []
        for claim in section["claims"]:
            asked = claim.get("findings", [])
            pairs = [by_key[key] for key in asked if key in by_key]
            verdicts = [finding["verdict"] for _, finding in pairs]
            verdicts += ["not testable here"] * (len(asked) - len(pairs))
            rows.append(Row(claim, pairs, overall(verdicts)))
        sections.append((section, rows))
    return sections


def changes(preset: str, chapters: Sequence[Chapter]) -> list[Change]:
    """Every finding whose verdict is not the signed one, or that is new, or gone."""
    signed = load(SIGNED).get(preset)
    if preset in EXEMPT or signed is None:
        return []
    before = signed["verdicts"]
    now = {f["key"]: (chapter, f["verdict"]) for chapter in chapters for f in chapter.findings}
    found = []
    for key in sorted(before.keys() | now.keys()):
        chapter, verdict = now.get(key, (None, "absent"))
        if verdict == before.get(key):
            continue
        name, reason = "no chapter", "a chapter that no longer has it"
        if chapter:
            name = chapter.name
            reason = "a finding that nobody has signed yet"
        if chapter and key in before:
            reason = _reason(chapter, signed["made"].get(name, {}))
        found.append(Change(key, name, before.get(key, "absent"), verdict, reason))
    return found


def _reason(chapter: Chapter, signed: dict[str, str]) -> str:
    different = [why for why, value in chapter.made.items() if signed.get(why, value) != value]
    return " and ".join(different) or "another processor or number of threads"


def faults(preset: str, chapters: Sequence[Chapter]) -> list[str]:
    """What `check` refuses: verdicts not signed, keys twice, claims without findings."""
    keys = [finding["key"] for chapter in chapters for finding in chapter.findings]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    found = [f"{key}: two findings have this key; rename one" for key in twice]
    for path in sorted(TEXTS.glob("*.yaml")):
        unused = sorted(key for key in load(path).keys() - set(keys) if "." in key)
        found += [f"{path}: no chapter has the finding {key}; remove it" for key in unused]
    claims = [row.claim for _, rows in join(load(CLAIMS), chapters) for row in rows]
    for claim in claims:
        for key in claim.get("findings", []):
            if key not in keys:
                told = f"{CLAIMS}: claim {claim['id']}: no chapter has the finding {key}"
                found.append(f"{told}; correct one or the other")
    fix = f"look at it, then `make sign PRESET={preset}` and commit {SIGNED}"
    if preset not in load(SIGNED) and preset not in EXEMPT:
        found.append(f"PRESET={preset} has no signed verdicts yet ({len(keys)} findings): {fix}")
    for change in changes(preset, chapters):
        found.append(f"{change}: {fix}")
    return found


def sign(preset: str, chapters: Sequence[Chapter]) -> int:
    """Write the verdicts as they are now, below the comments that the file begins with.

    Returns how many changed.
    """
    everything = load(SIGNED)
    before = everything.get(preset, {"verdicts": {}})["verdicts"]
    findings = [finding for chapter in chapters for finding in chapter.findings]
    now = {finding["key"]: finding["verdict"] for finding in findings}
    made = {chapter.name: chapter.made for chapter in chapters}
    everything[preset] = {"verdicts": dict(sorted(now.items())), "made": made}
    old = SIGNED.read_text("utf-8") if SIGNED.exists() else ""
    comments = re.match(r"(#.*\n)*", old)[0]
    text = yaml.safe_dump(everything, width=200, allow_unicode=True, sort_keys=False)
    execute.write_whole(SIGNED, comments + text)
    return sum(before.get(key) != now.get(key) for key in before.keys() | now.keys())
