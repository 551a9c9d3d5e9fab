"""Claims, findings and signed verdicts: joined, counted, and stopping the build when one of them moves."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from companion import pages as generate
from companion import results

ROOT = Path(__file__).resolve().parent.parent

CLAIMS = {
    "front": ["fig-b", "fig-a"],
    "sections": [
        {
            "title": "First",
            "claims": [
                {
                    "id": "one",
                    "claim": "It rises.",
                    "paper": "2.3",
                    "certainty": "checked",
                    "tolerance": "interval",
                }
                | {"findings": ["a.one", "a.two"], "figure": "fig-a"},
                {
                    "id": "two",
                    "claim": "Out of reach.",
                    "paper": "7",
                    "certainty": "recalled",
                    "tolerance": "exact",
                }
                | {"why": "It needs a network."},
            ],
        }
    ],
}


def finding(key, agrees, measured=1.5):
    return {
        "key": key,
        "quantity": f"q of {key}",
        "paper": "2",
        "measured": measured,
        "agrees": agrees,
        "comment": "",
    }


def chapter(*findings, name="01_a"):
    figure = {"name": "fig-a", "alt": "A line.", "caption": "Rises [by] 5_0.", "png": b""}
    provenance = {"preset": "laptop", "sample: texts": "64", "device": "cpu", "torch": "2"}
    run = {"end_time": "2026-01-02T03:04:05.678", "commit": "abc1234"}
    parameters = {"model": "some/model"}
    return results.Chapter(
        name, "A: a title?", parameters, list(findings), {"fig-a": figure}, provenance, run, "Why?"
    )


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder with claims and two signed verdicts, and the chapter that gives exactly them."""
    (tmp_path / "book").mkdir()
    shutil.copy(ROOT / "_config.yml", tmp_path)
    monkeypatch.chdir(tmp_path)
    results.CLAIMS.write_text(yaml.safe_dump(CLAIMS))
    sound = chapter(finding("a.one", True), finding("a.two", None))
    results.sign("laptop", [sound])
    assert results.faults("laptop", [sound]) == []
    return sound


def test_a_changed_verdict_stops_the_build_in_one_line_until_it_is_signed(book):
    changed = book._replace(findings=[finding("a.one", False), book.findings[1]])
    (fault,) = results.faults("laptop", [changed])
    assert fault == (
        "a.one (01_a): the verdict was reproduced, now it is not reproduced: "
        "look at it, then `make sign PRESET=laptop` and commit book/verdicts.yaml"
    )
    assert results.sign("laptop", [changed]) == 1
    assert results.faults("laptop", [changed]) == []


def test_a_key_that_goes_or_comes_stops_the_build(book):
    results.CLAIMS.write_text(
        yaml.safe_dump(CLAIMS | {"sections": [{"title": "None", "claims": []}]})
    )
    gone = results.faults("laptop", [book._replace(findings=book.findings[:1])])
    assert [
        "a.two (no chapter): the verdict was not testable here, now it is absent" in gone[0],
        len(gone),
    ] == [
        True,
        1,
    ]
    (new,) = results.faults("laptop", [book, chapter(finding("b.new", True), name="02_b")])
    assert "b.new (02_b): a new finding, reproduced" in new
    (twice,) = results.faults("laptop", [book, chapter(book.findings[0], name="02_b")])
    assert "a.one: two findings have this key" in twice


def test_a_claim_that_names_no_finding_stops_every_preset(book):
    renamed = book._replace(findings=[finding("a.uno", True), book.findings[1]])
    for preset in ("laptop", "smoke"):
        assert any(
            "claim one: no chapter has the finding a.one" in f
            for f in results.faults(preset, [renamed])
        )


def test_smoke_is_exempt_and_an_unsigned_preset_has_one_line(book):
    assert (
        results.faults(
            "smoke", [book._replace(findings=[finding(f["key"], False) for f in book.findings])]
        )
        == []
    )
    (fault,) = results.faults("paper", [book])
    assert "PRESET=paper has no signed verdicts yet (2 findings)" in fault


def test_a_list_covers_what_a_machine_may_lack_and_outlives_signing(book):
    signed = {
        "laptop": {
            "a.one": ["reproduced", "not testable here", "absent"],
            "a.two": "not testable here",
        }
    }
    results.SIGNED.write_text(yaml.safe_dump(signed))
    without = book._replace(findings=book.findings[1:])
    lacking = book._replace(findings=[finding("a.one", None), book.findings[1]])
    for state in (book, lacking, without):
        assert results.faults("laptop", [state]) == []
        assert results.sign("laptop", [state]) == 0
        assert results.load_signed() == signed
    against = book._replace(findings=[finding("a.one", False), book.findings[1]])
    assert len(results.faults("laptop", [against])) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "not testable here"),
        (["not testable here", "reproduced"], "reproduced"),
        (["reproduced", "not reproduced", "not testable here"], "divided"),
        (["not reproduced"] * 2, "not reproduced"),
    ],
)
def test_one_word_for_many_findings(words, expected):
    assert results.overall(words) == expected


def test_the_pages_have_a_row_for_each_claim_and_link_what_answers_it(book, monkeypatch):
    extra = chapter(
        finding("b.more", None, {"value": 0.5, "low": None, "high": None, "n": 1}), name="02_b"
    )
    chapters = [book._replace(findings=[finding("a.one", True), finding("a.two", False)]), extra]
    page = generate.measured_page(CLAIMS, chapters, "laptop")
    for text in (
        "It rises. **2.3**",
        "It needs a network.",
        "</chapters/01_a>",
        "{ref}`figure <fig-a>`",
        "some/model",
    ):
        assert text in page
    assert "1 divided, 1 not testable here" in page
    beyond = page.split("## Findings beyond the paper")[1]
    assert "q of b.more" in beyond
    assert "a.one" not in beyond
    figure, answer = generate.story(CLAIMS, chapters, "laptop")
    assert ":alt: A line." in figure
    assert r"Rises \[by\] 5\_0." in figure
    assert "tests 1 of 2 claims and numbers of the paper: 1 divided, 1 not testable here" in answer
    assert "q of a.two: **1.5**" in answer
    assert "numbers mean nothing" in generate.story(CLAIMS, chapters, "smoke")[1]
    assert "Why?\n  - {doc}`A </chapters/02_b>`" in generate.chapter_map(chapters)
    status = generate.status_page(chapters, "laptop")
    for text in ("2026-01-02 03:04", "abc1234", "/chapters/02_b"):
        assert text in status


def test_every_number_of_our_reading_of_the_paper_has_its_row():
    claims = (
        results.load_claims()
        if Path.cwd() == ROOT
        else yaml.safe_load((ROOT / "book" / "claims.yaml").read_text())
    )
    rows = [claim for section in claims["sections"] for claim in section["claims"]]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() >= {"id", "claim", "paper", "certainty", "tolerance"}, row["id"]
        assert row.get("findings") or row.get("why"), (
            f"{row['id']}: neither a finding nor a reason why there is none"
        )
        assert row["certainty"] in generate.CERTAINTY
    told = " ".join(f"{row['claim']} {row['paper']} {row['tolerance']}" for row in rows)
    numbers = """14M 12B 154 512 1,000 143,000 2,097,152 300B 50k 410M 410.7 0.28 1.69 119.09 0.246 8 4 40.3 38.0
        24.6 32.9 79.6 73.4 46.5 43.2 59.6 57.2 30.47 33.4 25.3 53,000 18.5 39.9 63,000 32.8 52.2 133,000
        51.6 57.4 56.2 61.6 +19 −9 +17 +9 10,000 15,000 150M 64 2,000"""
    missing = [
        n for n in numbers.split() if not re.search(rf"(?<![\d.,]){re.escape(n)}(?![\d])", told)
    ]
    assert not missing
