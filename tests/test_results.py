"""Claims, findings and signed verdicts: joined, counted, and told when one of them moves."""

import json
import re
import shutil
from pathlib import Path

import jsonschema
import nbformat
import pytest
import yaml

from companion import pages as computed
from companion import results, site

GOOD, BAD, OPEN = "reproduced", "not reproduced", "not testable here"
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


def finding(key, verdict, measured=1.5):
    return {
        "key": key,
        "quantity": f"q of {key}",
        "paper": "2",
        "measured": measured,
        "verdict": verdict,
        "comment": "",
    }


def chapter(*findings, name="01_a", **about):
    figure = {"name": "fig-a", "alt": "A line.", "caption": "Drawn. Rises [by] 5_0.", "png": b""}
    made = {
        "title": "A: a title?",
        "question": "Why?",
        "answer": "It is *so*.",
        "parameters": {"model": "some/model"},
        "figures": {"fig-a": figure},
        "provenance": {"preset": "laptop", "sample: texts": "64", "device": "cpu"},
        "packages": {"torch": "2"},
        "run": {"end_time": "2026-01-02T03:04:05.678", "commit": "abc1234", "source": "12345678"},
    }
    return results.Chapter(name=name, findings=list(findings), **{**made, **about})


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder with claims and two signed verdicts, and the chapter that gives exactly them."""
    (tmp_path / "book").mkdir()
    shutil.copy(ROOT / "_config.yml", tmp_path)
    monkeypatch.chdir(tmp_path)
    results.CLAIMS.write_text(yaml.safe_dump(CLAIMS))
    sound = chapter(finding("a.one", GOOD), finding("a.two", OPEN))
    results.sign("laptop", [sound])
    assert results.faults("laptop", [sound]) == []
    return sound


def test_a_changed_verdict_is_told_with_the_likely_reason_until_it_is_signed(book):
    changed = book._replace(findings=[finding("a.one", BAD), book.findings[1]])
    (change,) = results.changes("laptop", [changed])
    assert (change.key, change.signed, change.now) == ("a.one", GOOD, BAD)
    (fault,) = results.faults("laptop", [changed])
    assert fault == (
        "a.one (01_a): signed reproduced, here not reproduced; likely because of another processor "
        "or number of threads: look at it, then `make sign PRESET=laptop` and commit "
        "book/verdicts.yaml"
    )
    assert results.sign("laptop", [changed]) == 1
    assert results.faults("laptop", [changed]) == []


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"parameters": {"model": "another"}}, "other parameters"),
        ({"provenance": {"device": "H100"}}, "another device"),
        ({"packages": {"torch": "3"}}, "other versions of packages"),
        ({"run": {"source": "x"}, "packages": {}}, "a change of the notebook and other versions"),
    ],
)
def test_the_likely_reason_is_what_differs_from_the_signed_run(book, about, reason):
    (change,) = results.changes(
        "laptop", [chapter(finding("a.one", BAD), book.findings[1], **about)]
    )
    assert change.reason.startswith(reason)


def test_a_key_that_goes_or_comes_is_told(book):
    (gone,) = results.changes("laptop", [book._replace(findings=book.findings[:1])])
    assert str(gone).startswith("a.two (no chapter): signed not testable here, here absent")
    new = chapter(finding("b.new", GOOD), name="02_b")
    (come,) = results.changes("laptop", [book, new])
    assert str(come).startswith("b.new (02_b): signed absent, here reproduced")
    assert come.reason == "a finding that nobody has signed yet"
    twice = results.faults("laptop", [book, chapter(book.findings[0], name="02_b")])
    assert "a.one: two findings have this key; rename one" in twice


def test_a_claim_that_names_no_finding_stops_every_preset(book):
    renamed = book._replace(findings=[finding("a.uno", GOOD), book.findings[1]])
    for preset in ("laptop", "smoke"):
        assert any(
            "claim one: no chapter has the finding a.one" in f
            for f in results.faults(preset, [renamed])
        )


def test_a_text_that_no_finding_uses_stops_every_preset(book):
    results.TEXTS.mkdir()
    (results.TEXTS / "01_a.yaml").write_text("a.one: {}\na.uno: {}\n")
    told = "book/words/01_a.yaml: no chapter has the finding a.uno; remove it"
    for preset in ("laptop", "smoke"):
        assert told in results.faults(preset, [book])


def test_smoke_is_exempt_and_an_unsigned_preset_has_one_line(book):
    assert (
        results.faults(
            "smoke", [book._replace(findings=[finding(f["key"], BAD) for f in book.findings])]
        )
        == []
    )
    (fault,) = results.faults("paper", [book])
    assert "PRESET=paper has no signed verdicts yet (2 findings)" in fault


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], OPEN),
        ([GOOD, GOOD], GOOD),
        ([OPEN, GOOD], "in part"),
        ([OPEN, "consistent"], "in part"),
        ([GOOD, "consistent"], "consistent"),
        ([GOOD, BAD, OPEN], "divided"),
        (["consistent", BAD], "divided"),
        ([BAD, OPEN], BAD),
        ([BAD, BAD], BAD),
    ],
)
def test_a_claim_of_several_parts_is_reproduced_only_if_every_part_is(words, expected):
    assert results.overall(words) == expected
    assert expected in results.WORDS


def test_a_part_that_no_chapter_has_is_not_dropped(book):
    claims = yaml.safe_load(results.CLAIMS.read_text())
    ((_, (row, _)),) = results.join(claims, [book._replace(findings=book.findings[:1])])
    assert row.verdict == "in part"


def written(folder, chapters, preset="laptop"):
    computed.write(chapters, preset, folder)
    return {path.name: path.read_text() for path in folder.glob("*.md")}


def test_the_pages_have_a_row_for_each_claim_and_link_what_answers_it(book, tmp_path):
    unknown = {"value": 0.5, "low": None, "high": None, "n": 1}
    extra = chapter(finding("b.more", OPEN, unknown), name="02_b")
    chapters = [book._replace(findings=[finding("a.one", GOOD), finding("a.two", BAD)]), extra]
    made = written(tmp_path / "out", chapters)
    page = made["measured.md"]
    for text in (
        "It rises. **2.3**",
        "It needs a network.",
        "</chapters/01_a>",
        "{ref}`figure <fig-a>`",
        "some/model",
        "(signed: not testable here)",
        "1 divided, 1 not testable here",
    ):
        assert text in page
    beyond = page.split("## Findings beyond the paper")[1]
    assert "q of b.more" in beyond
    assert "a.one" not in beyond
    assert ':alt: "A line."' in made["figure.md"]
    assert r"Rises \[by\] 5\_0 (computed in {doc}`A" in made["figure.md"]
    answer = made["answer.md"]
    assert "tests 1 of 2 claims and numbers of the paper: 1 divided, 1 not testable here" in answer
    assert "q of a.two: **1.5**" in answer
    assert "2 verdicts differ from the signed one" in answer
    assert "* - Why? It is *so*.\n  - {doc}`A </chapters/02_b>`" in made["map.md"]
    for text in ("2026-01-02 03:04", "abc1234", "/chapters/02_b", "torch"):
        assert text in made["status.md"]
    assert "numbers mean nothing" in written(tmp_path / "smoke", chapters, "smoke")["answer.md"]


def test_claims_joined_with_findings_are_one_file(book, tmp_path):
    changed = [book._replace(findings=[finding("a.one", BAD), book.findings[1]])]
    computed.write(changed, "laptop", tmp_path / "out")
    data = json.loads((tmp_path / "out" / "extra" / "claims.json").read_text())
    schema = json.loads((tmp_path / "out" / "extra" / "claims.schema.json").read_text())
    jsonschema.validate(data, schema)
    assert [claim["verdict"] for claim in data["claims"]] == [BAD, OPEN]
    assert data["claims"][0]["findings"][0]["signed"] == GOOD
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "version": 2}, schema)


def test_a_books_own_template_shows_figures_numbers_and_answers(book, tmp_path):
    deck = """# Deck

{{ figure("fig-a") }}

{{ found["a.one"].measured | number }} {{ answered["01_a"] | safe }}
"""
    (tmp_path / "book" / "deck.md.j2").write_text(deck)
    made = written(tmp_path / "out", [book])["deck.md"]
    assert ':alt: "A line."\n\nRises \\[by\\] 5\\_0.' in made
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"fig-a.png"}
    assert "1.5 It is *so*." in made


def test_a_changed_verdict_is_marked_below_its_findings(book, tmp_path, monkeypatch):
    changed = book._replace(findings=[finding("a.one", BAD), book.findings[1]])
    kept = {"companion": {"findings": changed.findings}}
    output = nbformat.v4.new_output("display_data", metadata=kept)
    cells = [nbformat.v4.new_code_cell("1", outputs=[output])]
    cells += [nbformat.v4.new_markdown_cell("End.")]
    path = tmp_path / "01_a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    site.stage([path], results.changes("laptop", [changed]))
    staged = nbformat.read(site.STAGED / path.name, as_version=4).cells
    assert len(staged) == 3
    assert "signed reproduced, here not reproduced" in staged[1].source


def test_every_number_of_our_reading_of_the_paper_has_its_row():
    claims = (
        results.load(results.CLAIMS)
        if Path.cwd() == ROOT
        else yaml.safe_load((ROOT / "book" / "claims.yaml").read_text())
    )
    rows = [claim for section in claims["sections"] for claim in section["claims"]]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() >= {"id", "claim", "place", "paper", "certainty", "tolerance"}, row["id"]
        assert row.get("findings") or row.get("why"), (
            f"{row['id']}: neither a finding nor a reason why there is none"
        )
        assert row["certainty"] in {"checked", "read", "ours"}, f"{row['id']}: recalled"
    told = " ".join(f"{row['claim']} {row['paper']} {row['tolerance']}" for row in rows)
    numbers = """14M 12B 154 512 1,000 143,000 2,097,152 300B 50k 410M 410.7 0.28 1.69 119.09 0.246
        8 4 40.3 38.0 24.6 32.9
        79.6 73.4 46.5 43.2 59.6 57.2 30.47 33.4 10,000 15,000 150M 256 2,000
        0.6 0.83 0.60 0.57 0.05"""
    missing = [
        n for n in numbers.split() if not re.search(rf"(?<![\d.,]){re.escape(n)}(?![\d])", told)
    ]
    assert not missing
