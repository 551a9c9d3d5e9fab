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

from companion.execute import literals

CLAIMS, SIGNED = Path("book/claims.yaml"), Path("book/verdicts.yaml")
EXEMPT = {"smoke"}  # its numbers mean nothing, so neither do its verdicts
WORDS = ("reproduced", "consistent", "in part", "divided", "not reproduced", "not testable here")
SIGNED_HEADER = """\
# The verdicts that someone looked at and signed, preset by preset. `make sign PRESET=…` writes what
# the chapters now say; the diff of this file is what there is to review. A list holds every verdict
# that is fine, for findings that rest on what a machine may lack, such as a network; `absent` in it
# lets the whole finding be missing. `made` says on what each chapter's verdicts rest.
"""


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
    def short(self) -> str:
        """Its title up to the colon."""
        return self.title.split(":")[0]


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


class Row(NamedTuple):
    """A claim, the findings that answer it with their chapters, and one word for them all."""

    claim: dict[str, Any]
    pairs: list[tuple[Chapter, dict[str, Any]]]
    verdict: str


def read(path: Path) -> Chapter:
    """Collect what a notebook says of itself from the metadata of its outputs."""
    content = nbformat.read(path, as_version=4)
    lines = [line for cell in content.cells for line in cell.source.splitlines()]
    title = next(line.removeprefix("# ") for line in lines if line.startswith("# "))
    parameters, findings, figures, kept = {}, [], {}, {}
    for cell in content.cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            parameters |= literals(cell.source)
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("companion", {})
            kept |= about
            findings += about.get("findings", [])
            if "alt" in about and "image/png" in output.get("data", {}):
                png = base64.b64decode(output["data"]["image/png"])
                figures[about["name"]] = {**about, "png": png}
    own = content.metadata.get("companion", {})
    opening = " ".join(content.cells[0].source.split("\n", 1)[-1].split())
    asked = re.findall(r"[^.?!]*\?", opening)
    return Chapter(
        name=path.stem,
        title=title.strip(),
        question=own.get("question") or (asked[0].strip() if asked else ""),
        answer=kept.get("answer", ""),
        parameters=parameters,
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


def load_claims() -> dict[str, Any]:
    """The paper's claims; none where the book has no such file."""
    if not CLAIMS.exists():
        return {"front": [], "sections": []}
    return yaml.safe_load(CLAIMS.read_text("utf-8"))


def join(claims: dict[str, Any], chapters: Sequence[Chapter]) -> list[tuple[dict, list[Row]]]:
    """Each section of the claims with its rows."""
    by_key = {f["key"]: (chapter, f) for chapter in chapters for f in chapter.findings}
    sections = []
    for section in claims["sections"]:
        rows = []
        for claim in section["claims"]:
            asked = claim.get("findings", [])
            pairs = [by_key[key] for key in asked if key in by_key]
            verdicts = [finding["verdict"] for _, finding in pairs]
            verdicts += ["not testable here"] * (len(asked) - len(pairs))
            rows.append(Row(claim, pairs, overall(verdicts)))
        sections.append((section, rows))
    return sections


def load_signed() -> dict[str, dict[str, Any]]:
    """The signed verdicts of every preset, and what they were made with."""
    return (yaml.safe_load(SIGNED.read_text("utf-8")) or {}) if SIGNED.exists() else {}


def made(chapter: Chapter) -> dict[str, str]:
    """On what a chapter's verdicts rest, part by part."""
    given = {key: value for key, value in chapter.parameters.items() if key != "preset"}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
    return {
        "other parameters": digest,
        "a change of the notebook": chapter.run.get("source", "unknown")[:8],
        "other versions of packages": ", ".join(f"{k} {v}" for k, v in chapter.packages.items()),
        "another device": chapter.provenance.get("device", "unknown"),
    }


def changes(preset: str, chapters: Sequence[Chapter]) -> list[Change]:
    """Every finding whose verdict is not the signed one, or that is new, or gone."""
    signed = load_signed().get(preset)
    if preset in EXEMPT or signed is None:
        return []
    now = {f["key"]: (chapter, f["verdict"]) for chapter in chapters for f in chapter.findings}
    found = []
    for key in sorted(signed["verdicts"].keys() | now.keys()):
        chapter, verdict = now.get(key, (None, "absent"))
        before = _fine(signed["verdicts"].get(key, "absent"))
        if verdict not in before:
            reason = _reason(chapter, signed.get("made", {}))
            name = chapter.name if chapter else "no chapter"
            found.append(Change(key, name, " or ".join(before), verdict, reason))
    return found


def _fine(words: str | list[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _reason(chapter: Chapter | None, signed: dict[str, dict[str, str]]) -> str:
    if chapter is None:
        return "a chapter that no longer has it"
    before = signed.get(chapter.name, {})
    different = [why for why, value in made(chapter).items() if before.get(why, value) != value]
    return " and ".join(different) or "another processor or number of threads"


def faults(preset: str, chapters: Sequence[Chapter]) -> list[str]:
    """What `check` refuses, a line each: verdicts not signed, keys twice, claims without findings."""
    keys = [f["key"] for chapter in chapters for f in chapter.findings]
    found = [
        f"{key}: two findings have this key; rename one"
        for key in sorted(set(keys))
        if keys.count(key) > 1
    ]
    signed, claims = load_signed(), load_claims()
    lists = [part["verdicts"].items() for part in signed.values()]
    optional = {key for pairs in lists for key, words in pairs if "absent" in _fine(words)}
    for claim in (claim for section in claims["sections"] for claim in section["claims"]):
        for key in sorted(set(claim.get("findings", [])) - set(keys) - optional):
            told = f"{CLAIMS}: claim {claim['id']}: no chapter has the finding {key}"
            found.append(f"{told}; correct one or the other")
    fix = f"look at it, then `make sign PRESET={preset}` and commit {SIGNED}"
    if claims["sections"] and preset not in signed and preset not in EXEMPT:
        found.append(f"PRESET={preset} has no signed verdicts yet ({len(keys)} findings): {fix}")
    return found + [f"{change}: {fix}" for change in changes(preset, chapters)]


def sign(preset: str, chapters: Sequence[Chapter]) -> int:
    """Write the verdicts as they are now, and say how many changed.

    A list that covers the present verdict stays.
    """
    everything = load_signed()
    before = everything.get(preset, {}).get("verdicts", {})
    now = {f["key"]: f["verdict"] for chapter in chapters for f in chapter.findings}
    now |= {key: "absent" for key, words in before.items() if "absent" in words and key not in now}
    after = {}
    for key, word in sorted(now.items()):
        covered = word in _fine(before.get(key, []))
        after[key] = before[key] if covered else word
    rest = {chapter.name: made(chapter) for chapter in chapters}
    everything[preset] = {"verdicts": after, "made": rest}
    style = {"allow_unicode": True, "default_flow_style": None, "sort_keys": False, "width": 200}
    unfinished = SIGNED.with_suffix(".tmp")
    unfinished.write_text(SIGNED_HEADER + yaml.safe_dump(everything, **style), "utf-8")
    unfinished.replace(SIGNED)
    return sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())


def published(preset: str, chapters: Sequence[Chapter], commit: str) -> dict[str, Any]:
    """Claims joined with findings as one JSON object: what `claims.json` beside the book holds."""
    changed = {change.key: change.signed for change in changes(preset, chapters)}

    def told(chapter: Chapter, finding: dict[str, Any]) -> dict[str, Any]:
        signed = {"signed": changed[finding["key"]]} if finding["key"] in changed else {}
        return {**finding, "chapter": chapter.name, **signed}

    sections = join(load_claims(), chapters)
    claims = [
        {**row.claim, "section": section["title"], "verdict": row.verdict}
        | {"findings": [told(*pair) for pair in row.pairs]}
        for section, rows in sections
        for row in rows
    ]
    answered = {finding["key"] for claim in claims for finding in claim["findings"]}
    rest = [(chapter, f) for chapter in chapters for f in chapter.findings]
    beyond = [told(chapter, f) for chapter, f in rest if f["key"] not in answered]
    about = {"$schema": "claims.schema.json", "version": 1, "preset": preset, "commit": commit}
    return {**about, "verdicts": list(WORDS), "claims": claims, "beyond": beyond}
