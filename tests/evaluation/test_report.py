"""Reports contain the measured values, and prompts cannot inject anything into a report."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jaxdiff.evaluation import comparison, intervals
from jaxdiff.evaluation.records import Prompt, Scores
from jaxdiff.evaluation.report import markdown, page, report, wording

HOSTILE = "</h4><script>document.title='owned'</script> a | b\n# c [d](e) `f` \ud800 \u202e"
FAILED = np.nan


def scores(by_prompt: list[list[float]], categories: str = "", name: str = "first") -> Scores:
    """Makes scores of prompts whose images have these "correct" values; categories are letters."""
    categories = categories or "a" * len(by_prompt)
    correct = np.array([value for values in by_prompt for value in values], np.float64)
    return Scores(
        name=name,
        settings={"model": name, "steps": "20"},
        prompts=[Prompt(f"p{n}", f"prompt {n}", c) for n, c in enumerate(categories)],
        keys=[f"{n:09d}" for n in range(len(correct))],
        seeds=np.array([seed for values in by_prompt for seed in range(len(values))]),
        owners=np.array([n for n, values in enumerate(by_prompt) for _ in values], np.int32),
        values={"correct": correct},
        reasons=["not made" if np.isnan(c) else "" if c else "wrong color: red" for c in correct],
    )


def picture(size: int = 64):
    """Returns a function that gives an image for every key, and a list of what was asked for."""
    written = io.BytesIO()
    Image.effect_noise((size, size // 2), 80).convert("RGB").save(written, "png")
    asked = []

    def give(name: str, keys) -> list[tuple[str, bytes]]:
        asked.append((name, *keys))
        return [(key, written.getvalue()) for key in keys]

    return give, asked


def test_overall_gives_every_category_the_same_weight():
    rows = comparison.summary(scores([[1, 1], [1, 0], [0, 0]], "aab"))["correct"]
    assert [(row.category, row.estimate.value) for row in rows] == [
        (None, 0.375),
        ("a", 0.75),
        ("b", 0),
    ]
    assert [(row.prompts, row.images) for row in rows] == [(3, 6), (2, 4), (1, 2)]


def test_a_missing_image_is_wrong_and_has_no_other_value():
    run = scores([[1, FAILED], [1, 1]])
    run.values["clip_score"] = np.array([30.0, np.nan, 31, 32])
    assert comparison.failed(run).tolist() == [False, True, False, False]
    summary = comparison.summary(run)
    assert (summary["correct"][0].estimate.value, summary["correct"][0].images) == (0.75, 4)
    assert (summary["clip_score"][0].estimate.value, summary["clip_score"][0].images) == (31, 3)


def test_a_failed_image_is_also_recognised_by_its_reason():
    run = replace(scores([[1, 0]]), reasons=["", "not made"])
    assert comparison.failed(run).tolist() == [False, True]


def test_the_interval_of_a_perfect_score_is_not_empty():
    (overall, _) = comparison.summary(scores([[1, 1]] * 10))["correct"]
    assert overall.estimate.value == overall.estimate.high == 1
    assert overall.estimate.low == intervals.wilson(10, 10)[0]  # of ten prompts, not twenty images


def test_the_interval_of_equal_prompts_is_not_empty():
    (overall, _) = comparison.summary(scores([[1, 0]] * 10))["correct"]
    assert (overall.estimate.low, overall.estimate.high) == intervals.wilson(5, 10)


def test_too_many_categories_are_ignored():
    many = comparison.MOST_CATEGORIES + 1
    run = scores([[0]] * many, "".join(chr(0x4E00 + n) for n in range(many)))
    assert [row.category for row in comparison.summary(run)["correct"]] == [None, ""]
    assert comparison.failures(run) == {"": {"wrong color": many}}


def test_runs_are_paired_by_prompt_and_seed():
    first = scores([[1, 0, 0], [1, 1, 0]])
    second = scores([[1, 1, 1], [0, 1, 1]], name="second")
    backwards = slice(None, None, -1)
    second = replace(
        second,
        owners=second.owners[backwards],
        seeds=second.seeds[backwards] - 1,  # the seeds -1 (unknown), 0 and 1 instead of 0, 1 and 2
        values={"correct": second.values["correct"][backwards]},
    )
    (compared,) = comparison.compare([first, second])
    # By prompt and seed: (0, 0) 1 and 1, (0, 1) 0 and 1, (1, 0) 1 and 1, (1, 1) 1 and 1.
    assert (compared.name, compared.pairs) == ("second", 4)
    overall, category = compared.changes["correct"]
    assert overall.difference.value == category.difference.value == 0.25
    assert (overall.prompts, overall.pairs) == (2, 4)


def test_unknown_seeds_make_no_pairs():
    run = replace(scores([[1, 0]]), seeds=np.array([-1, -1]))
    assert comparison.compare([run, run]) == [comparison.Comparison("first", 0, {})]


def test_equal_runs_have_no_interval():
    run = scores([[1, 0], [0, 1]])
    difference = comparison.compare([run, run])[0].changes["correct"][0].difference
    assert (difference.value, difference.p) == (0, 1)
    assert np.isnan([difference.low, difference.high]).all()


def test_the_worst_prompts_come_from_each_category_in_turn():
    run = scores([[0, 0], [0, 0], [1, 0], [1, 1], [0, 0]], "aaabb")
    found = comparison.worst(run, "correct", 10)
    assert [(w.prompt.id, w.value, w.images) for w in found] == [
        ("p0", 0, [0, 1]),
        ("p4", 0, [8, 9]),
        ("p1", 0, [2, 3]),
        ("p2", 0.5, [4, 5]),
    ]
    assert comparison.worst(run, "correct", 2) == found[:2]


def test_where_lower_is_better_the_worst_are_the_highest():
    run = scores([[0], [0], [0]])
    run.values["near_duplicates"] = np.array([0.5, 0, 1.0])
    found = comparison.worst(run, "near_duplicates", 3)
    assert [w.prompt.id for w in found] == ["p2", "p0"]


def test_pairs_that_differ_come_from_each_prompt_and_category_in_turn():
    first = scores([[1, 1, 0], [1, 0, FAILED], [1, 1, 1]], "aab")
    second = scores([[0, 0, 0], [0, 1, 1], [1, 0, 1]], "aab", "second")
    lost, won = comparison.differing(first, second, "correct", 3)
    assert (lost.higher, lost.pairs) == ("first", 4)
    # Prompts 0 and 2 begin, each the first of its category; prompt 0's second pair waits.
    assert lost.largest == [(0, 0), (7, 7), (3, 3)]
    assert (won.higher, won.pairs, won.largest) == ("second", 2, [(4, 4), (5, 5)])


def test_pairs_are_ordered_by_their_difference():
    first, second = scores([[1, 1], [1, 1]]), scores([[1, 1], [1, 1]], name="second")
    first.values["clip_score"] = np.array([30.0, 20, 31, np.nan])
    second.values["clip_score"] = np.array([31.0, 26, 35, 40])
    lower, higher = comparison.differing(first, second, "clip_score", 9)
    assert (lower.pairs, lower.largest) == (0, [])
    assert higher.largest == [(1, 1), (2, 2), (0, 0)]  # +6, +4, and the first prompt's other, +1


def test_pairs_that_differ_are_side_by_side(tmp_path):
    give, asked = picture()
    runs = two_runs()
    for run, values in zip(runs, (np.arange(8.0), np.arange(8.0)[::-1]), strict=True):
        run.values["clip_score"] = values
    report.write(tmp_path, "Shapes", {}, runs, give)
    (compared,) = json.loads((tmp_path / "report.json").read_text())["comparisons"]
    lost, won = compared["differing"]["correct"]
    assert (lost["higher"], lost["pairs"], won["higher"], won["pairs"]) == ("first", 0, "second", 3)
    assert [pair["prompt"] for pair in won["largest"]] == ["prompt 0", "prompt 3", "prompt 1"]
    a, b = won["largest"][0]["images"]
    assert (a["key"], a["seed"], a["value"], a["reason"]) == ("000000001", 1, 0, "wrong color: red")
    assert (b["key"], b["seed"], b["value"], b["reason"]) == ("000000001", 1, 1, "")
    largest = [group["largest"] for group in compared["differing"]["clip_score"]]
    assert list(map(len, largest)) == [2, 2]
    assert [name for name, *_ in asked] == ["first", "second"]  # each dataset is read once
    document = (tmp_path / "report.md").read_text()
    assert "### Only second is correct: 3 of 8 pairs\n" in document
    assert "| prompt 0 | 1 | wrong color: red | correct | 000000001 |" in document
    page = (tmp_path / "report.html").read_text()
    assert "Only second is correct: 3 of 8 pairs<" in page
    assert "CLIPScore is higher in first: 4 of 8 pairs, 2 shown<" in page
    one = re.search(r'<ul class="prompts pairs"><li>.*?</li>', page)[0]
    captions = re.findall(r"<figcaption><b[^>]*>(.*?)</b>(.*?)</figcaption>", one)
    assert captions == [("first", "wrong color: red"), ("second", "correct")]
    assert one.count('<img class="pixels" alt="Image 000000001, seed 1"') == 2


def test_equal_runs_have_no_pairs_that_differ(tmp_path):
    runs = [scores([[1, 0], [0, 1]]), scores([[1, 0], [0, 1]], name="second")]
    report.write(tmp_path, "Shapes", {}, runs, picture()[0])
    for name in ("report.html", "report.md"):
        assert "Pairs that differ" not in (tmp_path / name).read_text()
        assert "is correct:" not in (tmp_path / name).read_text()


@pytest.mark.parametrize(("others", "most"), [(1, 6), (9, 3)])
def test_pairs_are_few_whatever_the_number_of_runs(others, most):
    first = scores([[1]] * 20)
    runs = [first, *(scores([[0]] * 20, name=f"run {n}") for n in range(others))]
    for run in runs:
        run.values["sharpness"] = np.full(20, run.values["correct"][0])
    for compared in report.contents_of("Shapes", {}, runs)["comparisons"]:
        shown = {name: lost for name, (lost, _) in compared["differing"].items()}
        assert [lost["pairs"] for lost in shown.values()] == [20, 20]
        assert [len(lost["largest"]) for lost in shown.values()] == [most, 2]


def test_failures_are_counted_by_kind():
    run = replace(
        scores([[0, 0, 1], [0, FAILED, 0]], "ab"),
        reasons=["wrong color: red", "wrong color: blue", "", "too few objects: 1", "not made", ""],
    )
    assert comparison.failures(run) == {
        "a": {"wrong color": 2},
        "b": {"too few objects": 1, "not made": 2},
    }


def test_the_headline_is_the_judges_measure():
    run = scores([[1]])
    run.values["sharpness"] = np.array([0.1])
    assert comparison.headline([run]) == "correct"
    assert comparison.headline([replace(run, values={"sharpness": np.zeros(1)})]) is None


def two_runs() -> list[Scores]:
    first = scores([[1, 0], [0, FAILED], [1, 1], [0, 0]], "aabb")
    second = scores([[1, 1], [0, 1], [1, 1], [1, 0]], "aabb", "second")
    missing = {"clip_score": "there are no weights: name them with --clip"}
    return [replace(first, whole={"recall": 0.5, "cmmd": np.nan}, missing=missing), second]


def published() -> report.Table:
    return report.Table(
        "Published scores",
        "of others",
        ["model", "overall"],
        [["SDXL", 0.55], ["none", None], ["half", -0.5]],
        [
            ("GenEval's README", "https://github.com/djghosh13/geneval"),
            ("x", "javascript:x"),
            ("y", ""),
        ],
    )


def test_a_report_has_the_measured_values(tmp_path):
    report.write(tmp_path, "Shapes", {"command": "c"}, two_runs(), picture()[0], [published()])
    names = ["report.html", "report.json", "report.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    found = json.loads((tmp_path / "report.json").read_text("ascii"))
    assert (found["schema"], found["benchmark"], found["headline"]) == (1, "Shapes", "correct")
    first, second = found["runs"]
    assert (first["prompts"], first["images"], first["failed"]) == (4, 8, 1)
    overall = comparison.summary(two_runs()[0])["correct"][0].estimate
    told = first["measures"]["correct"][0]
    assert [told[k] for k in ("value", "low", "high")] == [0.375, overall.low, overall.high]
    assert first["whole"] == {"cmmd": None, "recall": 0.5}
    assert first["missing"] == {"clip_score": "there are no weights: name them with --clip"}
    assert first["failures"]["a"] == {"wrong color": 2, "not made": 1}
    assert second["measures"]["correct"][0]["value"] == 0.75
    (compared,) = found["comparisons"]
    assert (compared["name"], compared["to"], compared["pairs"]) == ("second", "first", 8)
    assert compared["measures"]["correct"][0]["value"] == 0.375
    assert found["tables"][0]["rows"] == [["SDXL", 0.55], ["none", None], ["half", -0.5]]
    for text in (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text():
        for said in (
            "37.5%",
            "+37.5 points",
            "no weights: name them with --clip",
            "0.55",
            "\u22120.50",
        ):
            assert said in text
        assert "https://github.com/djghosh13/geneval" in text
        assert "javascript:" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((0.375, 0.1, 0.6), "better (+37.5 points), shown at 95%"),
        ((-0.25, -0.4, -0.1), "worse (\u221225.0 points), shown at 95%"),
        ((0.1, -0.2, 0.4), "no difference shown at 95%"),
        ((0.0, None, None), "no pair differs"),
    ],
)
def test_a_comparison_has_a_verdict_in_words(change, said):
    contents = report.contents_of("Shapes", {}, two_runs())
    (compared,) = contents["comparisons"]
    compared["measures"]["correct"][0] |= dict(zip(("value", "low", "high"), change, strict=True))
    assert wording.verdict(contents, compared) == f"correct: {said}"
    assert f"correct: {said}" in markdown.document(contents).replace("\\", "")
    assert f"correct: {said}" in page.page(contents, picture()[0])
    first, second, verdict = wording.summary(contents)
    assert first.startswith("first: 37.5% correct (95% interval ")
    assert second.startswith("second: 75.0% correct")
    assert verdict == f"second compared with first: correct: {said}"


def test_equal_scores_give_equal_bytes(tmp_path):
    give, _ = picture()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        report.write(folder, "Shapes", {}, two_runs(), give)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    report.write(tmp_path, "Shapes", {}, two_runs(), picture()[0])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def lost(name, key):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        report.write(tmp_path, "Another", {}, two_runs(), lost)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_text_is_escaped(tmp_path):
    run = scores([[0, 0], [0, 0]], "ab", HOSTILE)
    run = replace(
        run,
        settings={HOSTILE: HOSTILE},
        prompts=[Prompt("p0", HOSTILE, HOSTILE), Prompt("p1", "another", "b")],
        reasons=[HOSTILE] * 4,
        keys=[HOSTILE] * 4,
        missing={"clip_score": HOSTILE},
    )
    table = report.Table(HOSTILE, HOSTILE, [HOSTILE, "b"], [[HOSTILE, HOSTILE]], [(HOSTILE, "")])
    other = replace(run, name=f"{HOSTILE} 2", values={"correct": np.ones(4)})
    report.write(tmp_path, HOSTILE, {HOSTILE: HOSTILE}, [run, other], picture()[0], [table])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 20
    document = (tmp_path / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script", document)
    assert not re.search(r"(?<!\\)`f", document)
    for block in document.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1
        assert not rows or len(rows) == len(block.splitlines())
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["runs"][0]["worst"][0]["prompt"] == HOSTILE


def test_a_page_is_self_contained(tmp_path):
    report.write(tmp_path, "Shapes", {}, two_runs(), picture()[0], [published()])
    page = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in page
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert address.startswith(("data:image/", "https://github.com/djghosh13/geneval"))
    assert not re.search(r"url\(|@import|style=", page)


@pytest.mark.parametrize(("size", "lossless"), [(64, True), (600, False)])
def test_thumbnails_are_small_and_few(tmp_path, size, lossless):
    give, asked = picture(size)
    report.write(tmp_path, "Shapes", {}, [scores([[0] * 9] * 50)], give)
    page = (tmp_path / "report.html").read_text()
    thumbnails = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(thumbnails) == 12 * 4
    assert [len(keys) for _, *keys in asked] == [12 * 4]
    assert page.count("4 of 9 images") == 12
    with Image.open(io.BytesIO(base64.b64decode(thumbnails[0]))) as image:
        assert image.size == ((64, 32) if lossless else (128, 64))
        if lossless:
            original = np.asarray(Image.open(io.BytesIO(dict(give("", "k"))["k"])))
            assert np.array_equal(np.asarray(image.convert("RGB")), original)


def test_missing_or_damaged_images_are_reported(tmp_path):
    def give(name, keys):
        return [("000000000", None), ("000000001", b"no image")]

    report.write(tmp_path, "Shapes", {}, [scores([[FAILED, 0], [1, 1]])], give)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<div class="none">not generated</div>') == 1
    assert page.count('<div class="none">unreadable</div>') == 1


def test_long_tables_are_truncated_in_the_page_and_complete_in_the_json(tmp_path):
    categories = "".join(chr(0x4E00 + n) for n in range(300))
    report.write(tmp_path, "Shapes", {}, [scores([[0]] * 300, categories)], picture()[0])
    for name in ("report.md", "report.html"):
        assert "report.json has 101 more rows." in (tmp_path / name).read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    assert len(found["runs"][0]["measures"]["correct"]) == 301


def test_a_report_without_a_judge_has_the_other_measures(tmp_path):
    run = replace(scores([[0, 0]]), values={"sharpness": np.array([0.25, 0.5])})
    report.write(tmp_path, "Drawn", {}, [run], picture()[0])
    document = (tmp_path / "report.md").read_text()
    assert "| sharpness | 0.3750 |" in document
    assert "worst" not in document
