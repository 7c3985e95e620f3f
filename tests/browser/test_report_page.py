"""A report as people meet it: opened from the disk in Chromium, on a desk and on a phone."""

import io

import numpy as np
import pytest
from chromium import browser
from PIL import Image

from jaxdiff.evaluation.records import Prompt, Scores
from jaxdiff.evaluation.report import report

pytestmark = pytest.mark.browser
HOSTILE = "</h4><script>document.title='owned'</script><img src=https://example.com/x.png>"
VALUES = {"single_object": [1, 1, 1, 1], "a category of a long name": [1, 0, 0, 0], "b": [0, 1, 1]}


def scores(name: str, lift: int) -> Scores:
    """Of two prompts in each category, with VALUES; in one more image right for each `lift`."""
    prompts, owners, correct = [], [], []
    for category, values in VALUES.items():
        for turn in (0, 1):
            owners += [len(prompts)] * len(values)
            text = HOSTILE if turn else "a star " + "x" * 300
            prompts.append(Prompt(f"p{len(prompts)}", text, category))
            correct += sorted(values, reverse=True)
            if lift and turn and 0 in values:
                correct[-1] = 1
    return Scores(
        name,
        {"model": name},
        prompts,
        [f"{n:09d}" for n in range(len(owners))],
        np.arange(len(owners)),
        np.array(owners, np.int32),
        {"correct": np.array(correct, np.float64), "sharpness": np.ones(len(owners))},
        ["" if right else "wrong color: a red circle" for right in correct],
        missing={"clip_score": HOSTILE},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module", params=[1, 3])
def runs(request) -> list[Scores]:
    return [scores(name, n) for n, name in enumerate(["first", "a_second_" * 9, HOSTILE])][
        : request.param
    ]


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    written = io.BytesIO()
    Image.new("RGB", (512, 256), "red").save(written, "png")

    def give(name, keys):
        return ((key, written.getvalue()) for key in keys)

    table = report.Table(
        "Published", "", ["model", *VALUES], [["x" * 40, 0.5, 0.5, 0.5]], [("them", "https://a.b")]
    )
    told = {"command": "jaxdiff evaluate " + "x" * 500}
    report.write(folder, "Shapes", told, runs, give, [table])
    return (folder / "report.html").as_uri()


def load(page, address: str, width: int) -> None:
    page.resize(width, 800)
    page.complaints.clear()
    page.requests.clear()
    page._call("Page.navigate", url="about:blank")
    page._call("Page.navigate", url=address)
    page.wait("document.readyState === 'complete' && document.querySelector('footer')")


@pytest.mark.parametrize("width", [1200, 360])
def test_a_page_asks_for_nothing_and_fits(page, address, width):
    load(page, address, width)
    assert page.complaints == []
    outside = [a for a in page.requests if not a.startswith(("data:", "about:"))]
    assert outside == [address]
    assert page.run("document.title") == "Shapes · jaxdiff"
    assert page.run("document.querySelectorAll('script').length") == 0
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    for part in (".results li", ".bars", ".prompts > li", ".pairs figure"):
        wide = f"[...document.querySelectorAll({part!r})].map((e) => e.scrollWidth - e.clientWidth)"
        assert max(page.run(wide), default=0) <= 0, part


def test_prompts_are_text_and_images_are_shown(page, address):
    load(page, address, 1200)
    prompts = page.run("[...document.querySelectorAll('.prompts h4')].map((h) => h.textContent)")
    assert HOSTILE in prompts
    sizes = page.run("[...document.images].map((i) => [i.naturalWidth, i.naturalHeight])")
    assert sizes
    assert all(size == [128, 64] for size in sizes)


@pytest.mark.parametrize("width", [1200, 360])
def test_pairs_that_differ_are_side_by_side(page, address, runs, width):
    load(page, address, width)
    shown = page.run("""
        [...document.querySelectorAll('details[open] .pairs > li')].map((pair) =>
            [...pair.querySelectorAll('figure')].map((figure) => {
                const box = figure.querySelector('img').getBoundingClientRect();
                return {left: box.left, right: box.right, top: box.top,
                    run: figure.querySelector('b').textContent,
                    said: figure.querySelector('b').nextSibling.data,
                    color: getComputedStyle(figure.querySelector('figcaption')).borderTopColor};
            }))
    """)
    assert len(shown) == 2 * (len(runs) - 1)  # one in each category with a wrong image
    others = [run.name for run in runs[1:] for _ in range(2)]
    for (left, right), other in zip(shown, others, strict=True):
        assert (left["run"], left["said"]) == ("first", "wrong color: a red circle")
        assert (right["run"], right["said"]) == (other, "correct")
        assert left["top"] == right["top"]
        assert left["right"] < right["left"]
        assert left["color"] != right["color"]


def test_bars_and_whiskers_are_as_wide_as_their_numbers(page, address, runs):
    load(page, address, 1200)
    rows = page.run("""
        [...document.querySelector('.bars').querySelectorAll('tr')].filter((row) =>
            row.querySelector('svg')).map((row) => {
                const track = row.querySelector('.track').getBoundingClientRect();
                const mean = row.querySelector('.mean').getBoundingClientRect();
                const whisker = row.querySelector('.interval').getBoundingClientRect();
                const place = (x) => 100 * (x - track.x) / track.width;
                return {mean: place(mean.right), low: place(whisker.left),
                    high: place(whisker.right), text: row.querySelector('.value').textContent,
                    color: getComputedStyle(row.querySelector('.mean')).fill};
            })
    """)
    assert len(rows) == (1 + len(VALUES)) * len(runs)
    for row in rows:
        value, bounds = row["text"].split("% ")
        low, high = map(float, bounds.split(" to "))
        told = (float(value), low, high)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(told, abs=0.3)
    assert len({row["color"] for row in rows}) == len(runs)
