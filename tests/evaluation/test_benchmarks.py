"""The benchmarks' official files: how they are read, and invalid files."""

import gzip
import json
import re

import pytest

from jaxdiff.errors import InputError
from jaxdiff.evaluation import benchmarks
from jaxdiff.evaluation.benchmarks import BENCHMARKS, manifest_rows, prompt_of, read
from jaxdiff.evaluation.published import PUBLISHED
from jaxdiff.evaluation.records import Prompt
from jaxdiff.worlds import shapes

GENEVAL = (
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], '
    '"prompt": "a photo of a bench"}',
    '{"tag": "counting", "include": [{"class": "cat", "count": 2}], '
    '"exclude": [{"class": "cat", "count": 3}], "prompt": "a photo of two cats"}',
    '{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, '
    '"position": ["left of", 0]}], "prompt": "a photo of a cup left of a dog"}',
)
PARTIPROMPTS = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    '"G I G G L E" painted on a wall \tIllustrations\tWriting & Symbols\t\n'
)
DPG_TABLE = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
    '12,"A cup, red.",,1,0,entity,whole,entity - whole (cup),Is there a cup?\n'
    '12,"A cup, red.",,2,1,attribute,color,"attribute - color (cup, red)",Is the cup red?\n'
    "COCO7,A dog.,,1,0,entity,whole,entity - whole (dog),Is there a dog?\n"
)


def file_of(folder, name: str, text: str | bytes):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def triples(prompts: list[Prompt]) -> list[tuple[str, str, str]]:
    return [(prompt.id, prompt.text, prompt.category) for prompt in prompts]


def test_shapes_has_its_own_distinct_prompts():
    prompts = read("shapes", None, per_tag=30)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 24 + 5 * 30
    assert [prompt.category for prompt in prompts[::30]] == [*shapes.TAGS][:6]
    assert prompts == read("shapes", None, per_tag=30)
    assert prompts != read("shapes", None, per_tag=30, seed=7)
    # With more prompts per tag, the first ones stay the same: their seeds come from their ids.
    assert {p.id: p for p in prompts}.items() <= {p.id: p for p in read("shapes", None)}.items()
    for prompt in prompts:
        assert shapes.caption_for(prompt.row).text() == prompt.text


def test_shapes_reads_rows_in_genevals_schema(tmp_path):
    rows = [prompt.row for prompt in read("shapes", None, per_tag=2)]
    path = file_of(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.row for prompt in read("shapes", path)] == rows


def test_geneval_rows_keep_their_place_and_their_bytes(tmp_path):
    prompts = read("geneval", file_of(tmp_path, "metadata.jsonl", "\n".join(GENEVAL)))
    assert triples(prompts) == [
        ("00000", "a photo of a bench", "single_object"),
        ("00001", "a photo of two cats", "counting"),
        ("00002", "a photo of a cup left of a dog", "position"),
    ]
    assert [json.dumps(prompt.row) for prompt in prompts] == list(GENEVAL)


def test_t2i_compbench_is_a_file_or_a_folder_of_files(tmp_path):
    """Six of its eight files have CR LF line ends, and six lack the last newline."""
    color = file_of(tmp_path, "color_val.txt", "a red cup\r\na blue dog\tnoted")
    file_of(tmp_path, "3d_spatial_val.txt", "a cup behind a dog\n")
    file_of(tmp_path, "color_train.txt", "a green pear\n")
    expected = [("color-00000", "a red cup", "color"), ("color-00001", "a blue dog", "color")]
    assert triples(read("t2i-compbench", color)) == expected
    everything = triples(read("t2i-compbench", tmp_path))
    assert everything == [("3d_spatial-00000", "a cup behind a dog", "3d_spatial"), *expected]


def test_dpgs_folder_and_table_give_the_same_prompts(tmp_path):
    table = file_of(tmp_path, "dpg_bench.csv", DPG_TABLE)
    file_of(tmp_path, "prompts/COCO7.txt", "A dog.\n")
    file_of(tmp_path, "prompts/12.txt", "A cup, red.")
    assert triples(read("dpg", table)) == [("12", "A cup, red.", ""), ("COCO7", "A dog.", "")]
    assert read("dpg", tmp_path / "prompts") == read("dpg", table)


@pytest.mark.parametrize("name", ["PartiPrompts.tsv", "PartiPrompts.tsv.gz"])
def test_partiprompts_keeps_quotes_and_spaces(tmp_path, name):
    content = PARTIPROMPTS.encode()
    path = file_of(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    prompts = read("partiprompts", path)
    assert triples(prompts) == [
        ("00000", "bond", "Abstract"),
        ("00001", '"G I G G L E" painted on a wall ', "Illustrations"),
    ]
    assert prompts[1].row["Challenge"] == "Writing & Symbols"


@pytest.mark.parametrize("header", ["Prompts,Category", "prompts,category"])
def test_drawbench_headers_are_case_insensitive(tmp_path, header):
    path = file_of(tmp_path, "drawbench.csv", f'{header}\n"A red cup, and a dog.",Colors\n')
    assert triples(read("drawbench", path)) == [("00000", "A red cup, and a dog.", "Colors")]


def test_hpsv2_is_a_list_per_style(tmp_path):
    for style in ("photo", "anime", "drawbench"):
        file_of(tmp_path, f"{style}.json", json.dumps([f"{style} one", f"{style} two"]))
    expected = [("photo/00000", "photo one", "photo"), ("photo/00001", "photo two", "photo")]
    assert triples(read("hpsv2", tmp_path / "photo.json")) == expected
    everything = triples(read("hpsv2", tmp_path))
    assert [prompt[2] for prompt in everything] == ["anime", "anime", "photo", "photo"]
    assert everything[2:] == expected


def test_your_own_prompts_may_be_any_manifest(tmp_path):
    rows = 'id,prompt,Category,width\nx,a red cup,tools,64\n,"a dog, two",,\n'
    assert triples(read("prompts", file_of(tmp_path, "rows.csv", rows))) == [
        ("x", "a red cup", "tools"),
        ("2", "a dog, two", ""),
    ]
    plain = read("prompts", file_of(tmp_path, "rows.txt", "a red cup\n\na dog\n"))
    assert triples(plain) == [("1", "a red cup", ""), ("2", "a dog", "")]


def test_a_manifests_row_leads_back_to_its_prompt(tmp_path):
    prompts = read("geneval", file_of(tmp_path, "metadata.jsonl", "\n".join(GENEVAL)))
    for row, prompt in zip(manifest_rows(prompts, 4), prompts, strict=True):
        assert (row["id"], row["prompt"], row["num_images"]) == (prompt.id, prompt.text, 4)
        # The columns that `jaxdiff generate` copies to an image's metadata.
        metadata = {name: row[name] for name in row.keys() - {"id", "prompt", "num_images"}}
        back = prompt_of(json.loads(json.dumps(metadata)), row["id"], row["prompt"])
        assert back == prompt
        assert json.dumps(back.row) == json.dumps(prompt.row)


def test_the_official_file_as_a_manifest_gives_the_same_rows():
    row = json.loads(GENEVAL[1])
    metadata = {name: row[name] for name in ("tag", "include", "exclude")}
    back = prompt_of(metadata, "2", row["prompt"])
    assert back.category == "counting"
    assert json.dumps(back.row) == GENEVAL[1]
    assert prompt_of({"Category": "Arts", "Note": None}, "1", "x").category == "Arts"
    assert prompt_of({"category": 7}, "1", "x").category == ""


@pytest.mark.parametrize("row", ["[]", "{", 7, None, "[" * 10_000])
def test_an_invalid_row_is_rejected(row):
    with pytest.raises(InputError, match="row 'x': its benchmark_row"):
        prompt_of({"category": "", "benchmark_row": row}, "x", "a cup")


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "shapes"])
def test_the_error_for_a_missing_official_file_tells_where_it_is(name):
    with pytest.raises(InputError, match=f"--benchmark {name} needs --prompts: ") as raised:
        read(name, None)
    assert BENCHMARKS[name].prompts in str(raised.value)


def geneval_with(**changes) -> str:
    row = {**json.loads(GENEVAL[0]), **changes}
    row = {name: value for name, value in row.items() if value is not None}
    return f"{GENEVAL[0]}\n{json.dumps(row)}\n"


BAD_FILES = {
    "geneval, no tag": ("geneval", "f.jsonl", geneval_with(tag=None), "line 2 .* has no tag, only"),
    "geneval, no prompt": ("geneval", "f.jsonl", geneval_with(prompt=None), "line 2 .* no prompt"),
    "geneval, no include": ("geneval", "f.jsonl", geneval_with(include=None), "has no include"),
    "geneval, no object": (
        *("geneval", "f.jsonl", geneval_with(include=[{"class": "cat"}])),
        "include must be a list of objects",
    ),
    "geneval, no place": (
        *("geneval", "f.jsonl"),
        geneval_with(include=[{"class": "cat", "count": 1, "position": ["above"]}]),
        "include must be a list of objects",
    ),
    "geneval, empty prompt": ("geneval", "f.jsonl", geneval_with(prompt=" "), "prompt is empty"),
    "geneval, no JSON": ("geneval", "f.jsonl", GENEVAL[0] + "\n{", "line 2: the line is not JSON"),
    "geneval, surrogate": (
        *("geneval", "f.jsonl", geneval_with(note="\ud800")),
        r"line 2 .* lone surrogate U\+D800",
    ),
    "shapes, tag": ("shapes", "f.jsonl", geneval_with(tag="cats"), "line 1 .* not in the shapes"),
    "another's file": ("partiprompts", "f.jsonl", GENEVAL[0], "line 1 .* has no Challenge, only"),
    "not UTF-8": ("partiprompts", "f.tsv", PARTIPROMPTS.encode() + b"\xff\t\t\t\n", "byte 0xff"),
    "UTF-16": ("partiprompts", "f.tsv", PARTIPROMPTS.encode("utf-16"), "UTF-16; save it as UTF-8"),
    "empty": ("t2i-compbench", "f_val.txt", "\n\n", "f_val.txt has no prompts"),
    "no style": ("hpsv2", "cats.json", '["a cat"]', "row 1 .* must be one of anime"),
    "no list": ("hpsv2", "photo.json", '{"a": "cat"}', "is not a JSON list"),
    "no category": ("drawbench", "f.csv", "Prompts,Kind\na cup,x\n", "line 2 .* has no category"),
    "item twice": ("dpg", "f.csv", DPG_TABLE + "12,a dog,,,,,,,\n", "line 5: the id '12' is used"),
    "long id": ("prompts", "f.csv", f"id,prompt\n{'x' * 501},a\n", "line 2 .* 1 to 500 characters"),
    "long row": ("prompts", "f.csv", f"prompt,note\na,{'x' * 2**16}\n", "more than 65536 charac"),
    "id twice": ("prompts", "f.csv", "id,prompt\nx,a\nx,b\n", "line 3: the id 'x' is used before"),
    "a wrong ending": ("geneval", "f.html", "<html>", "must end in one of"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_an_invalid_file_gives_a_one_line_error(tmp_path, fault):
    name, file, text, message = BAD_FILES[fault]
    with pytest.raises(InputError, match=message) as raised:
        read(name, file_of(tmp_path, file, text))
    assert str(tmp_path / file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_the_files_is_reported(tmp_path):
    for name, missing in (("t2i-compbench", "_val.txt"), ("hpsv2", ".json"), ("dpg", ".txt")):
        with pytest.raises(InputError, match=re.escape(missing)):
            read(name, tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read("geneval", tmp_path / "nowhere.jsonl")


def test_the_size_of_a_file_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "MAX_BYTES", 2**20)
    path = file_of(tmp_path, "rows.txt", f"{'a' * 3000}\n" * 1000)
    with pytest.raises(InputError, match=r"rows.txt has more than 1 MiB; split it"):
        read("prompts", path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_complete_and_name_their_sources(name):
    table = PUBLISHED[name]
    assert BENCHMARKS[name].scorer
    assert len(table.rows) == len(table.sources)
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert len({row[0] for row in table.rows}) == len(table.rows)
    assert all(address.startswith("https://") for _, address in table.sources)


@pytest.mark.parametrize(("name", "rounding"), [("geneval", 0.011), ("hpsv2", 0.011)])
def test_published_means_match_their_categories(name, rounding):
    for model, overall, *categories in PUBLISHED[name].rows:
        assert sum(categories) / len(categories) == pytest.approx(overall, abs=rounding), model
