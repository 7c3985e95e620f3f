"""The gallery as people meet it: opened from the disk in Chromium, with keys and a mouse."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chromium import browser
from making import make_plan, make_shard
from PIL import Image

from jaxdiff import cli
from jaxdiff.dataset.finished import gallery

pytestmark = pytest.mark.browser
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">'; `id` $(id) \\ \u202e\ttab"
MANY = 10_000


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium):
    """A page that must not have complained when the test ends."""
    chromium.resize(1280, 800)
    chromium.complaints.clear()
    chromium.requests.clear()
    yield chromium
    assert chromium.complaints == []


@pytest.fixture(scope="module")
def few(tmp_path_factory, tiny_checkpoint) -> str:
    """The address of a gallery of eight images, two of them failed."""
    columns = {"__proto__": "x", "constructor": 1, "two words": "y", "text": "<b>", "deep": [{}]}
    rows = [
        {"prompt": "a red circle above a star", "id": "first", "seed": 7, "group": "Shapes"},
        {"prompt": "a blue circle", "seed": 70, "group": "shapes", "level": 3},
        {"prompt": "red and blue", "seed": 8, "negative_prompt": "blur", "sampler": "euler"},
        {"prompt": "ein grüner Stern 🌟\nأحمر", "seed": 1, "group": None},
        {"prompt": HOSTILE, "id": HOSTILE, "seed": 2, **{HOSTILE: HOSTILE}, **columns},
        {"prompt": "wide", "seed": 3, "width": 768, "height": 8},
        {"prompt": "a lost ring", "seed": 4},
        {"prompt": "a lost cross", "seed": 5},
    ]
    folder = tmp_path_factory.mktemp("few")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    run = make_plan(folder / "few <b>", folder / "rows.jsonl", tiny_checkpoint)
    for shard in run.shards:
        make_shard(run, shard, failing=["000000006", "000000007"])
    return gallery.write(folder / "few <b>").as_uri()


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """The address of a gallery of 10,000 images of 64x64."""
    folder = tmp_path_factory.mktemp("many")
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(MANY):
            row = {"prompt": f"number {n} of many", "seed": 0, "rest": n % 10}
            file.write(json.dumps(row) + "\n")
    run = make_plan(folder / "many", folder / "rows.jsonl", "shapes64", width=64, height=64)
    for shard in run.shards:
        make_shard(run, shard)
    return gallery.write(folder / "many").as_uri()


def shown(page) -> list[str]:
    """The prompts in the grid, in the order of the page."""
    return page.run("[...document.querySelectorAll('#grid > a b')].map((b) => b.textContent)")


def text(page, id_: str) -> str:
    return page.run(f"document.getElementById('{id_}').textContent")


def settings(page, id_: str = "settings") -> dict[str, str]:
    terms, values = (
        page.run(f"[...document.querySelectorAll('#{id_} {tag}')].map((e) => e.textContent)")
        for tag in ("dt", "dd")
    )
    return dict(zip(terms, values, strict=True))


def type_query(page, query: str) -> None:
    page.press("/", *query)


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("red", 2),
        ("RED Circle", 1),
        ('"red circle"', 1),
        ('"circle red"', 0),
        ("id:first", 1),
        ("seed:7", 1),
        ("7", 3),  # two seeds, and the id of the last row
        ("group:shapes", 2),
        ("group:shape", 2),
        ("group=shape", 0),
        ("level=3", 1),
        ("sampler:euler", 1),
        ("blur", 1),
        ("status:failed", 2),
        ("status:failed cross", 1),
        ("not finite", 2),
        ("grüner", 1),
        ("what: red", 0),
        ("constructor=1", 1),
        ("toString:x", 0),
        ("[{}]", 1),
        ('"', 8),  # of a phrase that is being typed
        ("seed>7", 2),
        ("seed>=7 seed<70", 2),
        ("Seed=7.0", 1),
        ("seed!=7", 7),
        ("width=16 -red", 5),
        ('-"red circle"', 7),
        ("-level>2", 7),
        ("level<=3", 1),
        ("group>1", 0),
        ("-sampler:euler -status=failed", 5),
        ("-", 8),
        ('-"', 8),
        ("a>b", 0),
    ],
)
def test_a_search_finds_prompts_and_metadata(page, few, query, count):
    page.open(few)
    assert len(shown(page)) == 8
    page.run(f"setQuery({json.dumps(query)})")
    assert len(shown(page)) == count
    assert text(page, "count") == f"{count} of 8 images"
    assert page.run("element('message').hidden") == (count > 0)


def test_what_is_typed_narrows_the_grid_and_stands_in_the_address(page, few):
    page.open(few)
    type_query(page, "blue")
    assert shown(page) == ["a blue circle", "red and blue"]
    page.wait("location.hash === '#q=blue'")
    page.press("Escape")
    assert len(shown(page)) == 8
    assert page.run("document.activeElement === document.body")
    page.wait("location.hash === '#'  || location.hash === ''")


def test_keys_go_through_the_grid_and_through_the_full_view(page, few):
    page.open(few)
    page.press("ArrowRight", "ArrowRight")
    assert page.run("document.activeElement.dataset.key") == "000000001"
    page.press("Enter")
    page.wait("element('view').open")
    assert (text(page, "prompt"), text(page, "position")) == ("a blue circle", "2 of 8")
    page.press("ArrowRight")
    assert text(page, "prompt") == "red and blue"
    page.wait("location.hash === '#image=000000002'")
    page.press("ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert (text(page, "prompt"), text(page, "position")) == ("a red circle above a star", "1 of 8")
    page.press("Escape")
    page.wait("!element('view').open && document.activeElement.dataset.key === '000000000'")
    page.press("ArrowDown")
    columns = page.run("sizes.columns")
    assert page.run("document.activeElement.dataset.key") == f"{columns:09d}"


def test_one_tile_at_most_carries_a_ring(page, few):
    page.open(few)
    page.click("#grid > a")  # where the mouse stays
    page.wait("element('view').open")
    page.press("ArrowRight", "Escape")
    page.wait("!element('view').open && document.activeElement.dataset.key === '000000001'")
    ringed = "getComputedStyle(e).outlineStyle !== 'none'"
    hovered = "getComputedStyle(e.firstChild).boxShadow.includes(' 4px')"
    found = f"[...document.querySelectorAll('#grid > a')].filter((e) => {ringed} || {hovered})"
    assert page.run(f"{found}.map((e) => e.dataset.key)") == ["000000001"]


def test_the_syntax_of_the_search_is_explained_below_the_box(page, few):
    page.open(few)
    said = text(page, "syntax")
    queries = said.removeprefix("Also: ").split(", ")
    assert queries == ['"a phrase"', "-word", "steps=20", "seed>10", "sampler:euler"]
    assert page.run("element('syntax').clientHeight > 0")


def test_an_address_opens_what_it_says(page, few):
    page.open(f"{few}#q=red&image=000000002")
    assert (text(page, "prompt"), text(page, "position")) == ("red and blue", "2 of 2")
    page.click("#close")
    page.wait("location.hash === '#q=red'")
    assert page.run("element('search').value") == "red"
    page.open(f"{few}#image=999999999")
    assert not page.run("element('view').open")
    assert len(shown(page)) == 8


def test_an_unfinished_dataset_says_so(page, tmp_path, tiny_checkpoint):
    (tmp_path / "prompts.txt").write_text("a ring\n" * 6)
    said = {"images_per_shard": 4, "batch_size": 2}
    run = make_plan(tmp_path / "out", tmp_path / "prompts.txt", tiny_checkpoint, **said)
    page.open(gallery.write(tmp_path / "out").as_uri())
    assert text(page, "count") == "0 images so far, of 6 planned"
    assert text(page, "message") == "No images have been generated yet."
    make_shard(run, 0)
    page.open(gallery.write(tmp_path / "out").as_uri())
    assert text(page, "count") == "4 images so far, of 6 planned"
    assert len(shown(page)) == 4


def test_back_closes_the_full_view(page, few):
    page.open(f"{few}#q=blue")
    page.click("#grid > a")
    page.wait("element('view').open && location.hash === '#q=blue&image=000000001'")
    page.run("history.back()")
    page.wait("!element('view').open && location.hash === '#q=blue'")


def test_the_full_view_has_every_setting_and_the_way_to_its_likes(page, few):
    page.open(f"{few}#image=000000001")
    expected = {"seed": "70", "sampler": "ddim", "group": "shapes", "level": "3"}
    expected |= {"size": "16 \u00d7 8", "model": "tiny", "noise": "jax", "dtype": "float32"}
    assert expected.items() <= settings(page).items()
    assert set(settings(page, "hashes")) == {"sha256", "pixel_sha256", "model"}
    page.wait("element('image').naturalWidth === 16")
    assert page.run("getComputedStyle(element('image')).imageRendering") == "pixelated"
    assert page.run("element('image').clientWidth") > 160
    links = "[...document.querySelectorAll('#settings a')]"
    page.run(f"{links}.find((link) => link.textContent === 'shapes').click()")
    page.wait("!element('view').open")
    assert shown(page) == ["a red circle above a star", "a blue circle"]


def test_the_full_view_shows_what_an_image_begins_with(page, tmp_path, tiny_checkpoint):
    Image.new("RGB", (16, 8), "red").save(tmp_path / "red.png")
    Image.new("L", (16, 8), 255).save(tmp_path / "white.png")
    image = {"prompt": "a ring", "image": "red.png", "strength": 0.5}
    rows = [{**image, "mask_image": "white.png"}, image, {"prompt": "a star"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = make_plan(tmp_path / "out", tmp_path / "rows.jsonl", tiny_checkpoint, steps=4)
    for shard in run.shards:
        make_shard(run, shard)
    address = gallery.write(tmp_path / "out").as_uri()
    shown = "[...document.querySelectorAll('figure')].filter((e) => e.clientWidth)"
    captions = f"{shown}.map((e) => e.innerText)"
    seen = f"{shown}.every((e) => e.firstElementChild.naturalWidth === 16)"
    page.open(f"{address}#image=000000000")
    page.wait(seen)
    assert page.run(captions) == ["begins with", "mask"]
    assert page.run(f"{shown}.every((e) => e.firstElementChild.alt)")
    picture = "document.querySelectorAll('figure img')"
    assert page.run(f"getComputedStyle({picture}[1]).imageRendering") == "pixelated"
    places = ("element('image')", f"{picture}[0]", f"{picture}[1]")
    boxes = [f"{place}.getBoundingClientRect()" for place in places]
    assert page.run(f"{boxes[0]}.right < {boxes[1]}.left && {boxes[1]}.bottom < {boxes[2]}.top")
    expected = {"init_image": "red.png", "strength": "0.5", "mask_image": "white.png"}
    assert expected.items() <= settings(page).items()
    row = text(page, "command").split("\n")[0]
    assert '"init_image":"red.png","strength":0.5,"mask_image":"white.png"}' in row
    page.press("ArrowRight")
    page.wait(seen)
    assert page.run(captions) == ["begins with"]
    assert "mask_image" not in settings(page)
    page.press("ArrowRight")
    assert page.run(captions) == []
    assert not {"init_image", "strength", "mask_image", "outpaint"} & settings(page).keys()
    assert '"init_image"' not in text(page, "command")
    page.run("setQuery('init_image=red.png')")
    assert page.run("results.length") == 2


def test_a_failed_image_says_why(page, few):
    page.open(few)
    assert text(page, "failed") == "2 failed"
    page.click("#failed")
    page.wait("results.length === 2")
    assert page.run("document.querySelector('#grid .failed').textContent") == "failednot finite"
    page.click("#grid > a")
    page.wait("element('view').open")
    assert text(page, "failure") == "This image could not be generated: not finite"
    assert page.run("element('original').hidden")
    assert '"prompt":"a lost ring"' in text(page, "command")


def test_what_a_dataset_says_is_text_and_nothing_else(page, few):
    page.open(f"{few}#image=000000004")
    assert page.run("document.title") == "few <b> · jaxdiff"
    assert text(page, "title") == "few <b>"
    assert text(page, "prompt") == HOSTILE
    said = settings(page)
    assert said["id"] == said[HOSTILE] == HOSTILE
    assert (said["__proto__"], said["two words"], said["deep"]) == ("x", "y", "[{}]")
    assert page.run("document.querySelectorAll('b b, h1 *, h2 *, dt *, pre *').length") == 0
    scripts = page.run("[...document.scripts].map((script) => script.src)")
    assert all(script.startswith(f"{few.rpartition('/')[0]}/files-") for script in scripts)
    for attack in ("<img src=x onerror=\"document.title='owned'\">", "<b onclick=1>"):
        page.run(f"setQuery({json.dumps(attack)})")
    assert page.run("document.title") == "few <b> · jaxdiff"


def test_even_markup_that_gets_in_cannot_run(chromium, few):
    chromium.open(few)
    chromium.complaints.clear()
    chromium.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"owned=1\">')")
    for _ in range(100):
        if any("Content Security Policy" in complaint for complaint in chromium.complaints):
            break
        time.sleep(0.02)
        chromium.run("1")
    assert any("Content Security Policy" in complaint for complaint in chromium.complaints)
    assert chromium.run("typeof owned") == "undefined"


def test_a_gallery_reads_nothing_but_its_own_files(page, few):
    page.open(f"{few}#image=000000000")
    page.wait("element('image').complete")
    for _ in range(100):  # the thumbnails behind it come in their own time
        files = {address for address in page.requests if address.partition("#")[0] != few}
        if len(files) > 10:
            break
        time.sleep(0.02)
        page.run("1")
    assert len(files) > 10
    folder = f"{few.rpartition('/')[0]}/files-"
    assert all(address.startswith(folder) or address == "about:blank" for address in files)


def test_large_images_have_thumbnails_and_open_in_full(page, few):
    page.open(f"{few}#q=wide")
    page.wait("document.querySelector('#grid img').naturalWidth === 384")
    page.click("#grid > a")
    page.wait("element('image').naturalWidth === 768")
    assert page.run("getComputedStyle(element('image')).imageRendering") == "auto"


def test_the_command_can_be_copied(page, few):
    page.open(f"{few}#image=000000000")
    page.click("#copy")
    page.wait("element('copy').textContent === 'Copied'")
    assert page.run("getSelection().toString()").split() == text(page, "command").split()


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_can_be_read(page, few, dark):
    page.resize(1280, 800, dark)
    page.open(few)
    colors = [
        [int(part) for part in page.run(f"getComputedStyle({where}).{what}")[4:-1].split(", ")]
        for where, what in (
            ("document.body", "backgroundColor"),
            ("document.body", "color"),
            ("element('count')", "color"),
        )
    ]
    ground, letters, quiet = (_luminance(color) for color in colors)
    assert (ground < letters) == dark
    for color in (letters, quiet):  # 4.5 is what WCAG 2.2 asks for, 1.4.3
        assert (max(ground, color) + 0.05) / (min(ground, color) + 0.05) >= 4.5


def _luminance(color: list[int]) -> float:
    """Of an sRGB color, as WCAG 2.2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (value / 255 for value in color)]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 2560])
def test_it_fits_every_window(page, few, width):
    page.resize(width, 800)
    for address in (few, f"{few}#image=000000004"):
        page.open(address)
        assert page.run("document.documentElement.scrollWidth") <= width
        right = "[...document.querySelectorAll('#grid > a, dialog[open] *')].map((e) => "
        right += "e.getBoundingClientRect().right).reduce((a, b) => Math.max(a, b))"
        assert page.run(right) <= width
    assert page.run("element('stage').clientHeight") > 150


def test_ten_thousand_images_cost_no_more_than_those_in_sight(page, many):
    began = time.monotonic()
    page.open(many)
    assert time.monotonic() - began < 10  # 0.7 s on a quiet machine
    assert page.run("images.length") == MANY
    assert text(page, "count") == "10,000 images"
    nodes = "document.querySelectorAll('*').length"
    assert page.run(nodes) < 400
    for place in (0.25, 0.5, 1):
        page.run(f"scrollTo(0, {place} * document.documentElement.scrollHeight)")
        page.wait(
            "[...document.querySelectorAll('#grid img')].every((i) => i.complete) && "
            "document.elementFromPoint(innerWidth / 3, innerHeight / 2).closest('#grid > a')"
        )
        assert page.run(nodes) < 400
    assert shown(page)[-1] == "number 9999 of many"
    page.click("#grid > a:last-child")
    page.wait("element('view').open")
    assert text(page, "position") == "10,000 of 10,000"


def test_ten_thousand_images_are_searched_while_one_types(page, many):
    page.open(many)
    began = time.monotonic()
    type_query(page, "rest=3 number 77")
    assert time.monotonic() - began < 5  # 16 keys, each with its own result
    assert page.run("results.length") == sum("77" in str(n) and n % 10 == 3 for n in range(MANY))
    assert shown(page)[0] == "number 773 of many"


def test_the_command_makes_the_same_image(page, tmp_path, tiny_checkpoint):
    prompt = 'it\'s "a" \\ red $(circle)\t`star` %s !! \u202e🌟 \n end'
    row = {"prompt": prompt, "id": "a'b", "negative_prompt": "gray", "note": "x", "num_images": 2}
    rows = [row | {"steps": 3, "guidance_scale": 2.5, "sampler": "euler"}, {"prompt": "a star"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    job = {"manifest": tmp_path / "rows.jsonl", "output": tmp_path / "out", "batch-size": 2}
    job |= {"model": tiny_checkpoint, "steps": 2, "noise": "torch", "guidance-rescale": 0.5}
    assert cli.main(["generate", *(f"--{name}={value}" for name, value in job.items())]) == 0
    made = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    address = gallery.write(tmp_path / "out").as_uri()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    wanted = next(row for row in made if row["image_index"] == 1)
    page.open(f"{address}#image={wanted['key']}")
    command = text(page, "command")
    assert all(character.isprintable() or character == "\n" for character in command)
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, env=environment, check=True)
    (again,) = pq.read_table(tmp_path / f"image-{wanted['key']}" / "metadata").to_pylist()
    assert again["prompt"] == prompt
    assert again["pixel_sha256"] == wanted["pixel_sha256"]


CONTROL = "\x03\ntouch x\n"  # ends the line being typed, and then runs a command


def test_a_prompt_with_control_characters_gives_a_command_without(page, tmp_path, tiny_checkpoint):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": CONTROL, "negative_prompt": CONTROL})
    )
    run = make_plan(tmp_path / "out", tmp_path / "rows.jsonl", tiny_checkpoint)
    make_shard(run, 0)
    page.open(f"{gallery.write(tmp_path / 'out').as_uri()}#image=000000000")
    row, generate = text(page, "command").split("\n")  # nothing else ends a line
    assert row.isprintable()
    assert generate.isprintable()
    written = subprocess.run(
        ["sh", "-ec", row.removesuffix(" &&")], cwd=tmp_path, capture_output=True, check=True
    )
    assert written.stdout == b""
    assert not (tmp_path / "x").exists()
    said = json.loads((tmp_path / "image-000000000.jsonl").read_text())
    assert (said["prompt"], said["negative_prompt"]) == (CONTROL, CONTROL)
    assert not page.run("element('copy').hidden")


def test_a_model_with_control_characters_has_no_command(page, tmp_path, tiny_checkpoint):
    (tmp_path / "prompts.txt").write_text("a ring\n")
    run = make_plan(tmp_path / "out", tmp_path / "prompts.txt", tiny_checkpoint)
    make_shard(run, 0)
    path = tmp_path / "out" / "_jaxdiff" / "plan" / "plan.json"
    said = json.loads(path.read_text())
    said["models"]["model"] = CONTROL
    path.write_text(json.dumps(said))
    page.open(f"{gallery.write(tmp_path / 'out').as_uri()}#image=000000000")
    assert text(page, "command") == (
        "There is no command: the value of --model contains an invisible character, which a "
        "terminal might obey."
    )
    assert page.run("getComputedStyle(element('copy')).display") == "none"
