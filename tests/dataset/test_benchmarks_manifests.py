"""Published prompt sets are read from their original files without options."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import make_plan

from jaxdiff.errors import InputError


@pytest.fixture
def planned(tmp_path, tiny_checkpoint):
    """Plans a manifest: `planned("x.csv", b"...")` returns (plan, images, rejected)."""

    def planned(name: str, content: bytes | None = None, **said):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        directory = tmp_path / "out"
        run = make_plan(directory, path, tiny_checkpoint, **said)
        shards = run.shards
        images = [image for n in shards for image in run.planned(n)]
        images.sort(key=lambda image: image.key)
        rejected = (directory / "rejected.jsonl").read_text().splitlines()
        return run.plan, images, [json.loads(line) for line in rejected]

    return planned


def asked(images) -> list[tuple[str, str]]:
    return [(image.id, image.request.prompt) for image in images]


def test_parti_prompts_keep_their_quotation_marks_and_spaces(planned):
    _, images, _ = planned(
        "PartiPrompts.tsv",
        b"Prompt\tCategory\tChallenge\tNote\n"
        b"bond\tAbstract\tBasic\tBiology-inspired concepts\n"
        b'"G I G G L E" painted in thick colors \tWorld Knowledge\tWriting & Symbols\t\n',
    )
    assert asked(images) == [("0", "bond"), ("1", '"G I G G L E" painted in thick colors ')]
    assert json.loads(images[1].metadata) == {
        "Category": "World Knowledge",
        "Challenge": "Writing & Symbols",
        "Note": "",
    }


@pytest.mark.parametrize("header", ["Prompts,Category", "prompts,category"])
def test_draw_bench_names_its_column_prompts(planned, header):
    _, images, _ = planned("drawbench.csv", f'{header}\n"A red, colored car.",Colors\n'.encode())
    assert asked(images) == [("0", "A red, colored car.")]
    assert list(json.loads(images[0].metadata).values()) == ["Colors"]


def test_a_table_without_a_header_is_rejected(planned):
    with pytest.raises(InputError, match=r"has no column 'prompt', only 'A red colored car"):
        planned("drawbench.csv", b"A red colored car.,Colors\nA blue dog.,Colors\n")


def test_gen_eval_keeps_its_checks(planned):
    row = {"tag": "position", "include": [{"class": "cow", "count": 1, "position": ["above", 0]}]}
    text = json.dumps(row | {"prompt": "a photo of a cow"})
    _, images, _ = planned("evaluation_metadata.jsonl", text.encode(), num_images=4)
    assert [image.image_index for image in images] == [0, 1, 2, 3]
    assert {image.id for image in images} == {"0"}
    assert json.loads(images[0].metadata) == row


def test_t2i_compbench_prompts_lose_only_their_line_endings(planned):
    _, images, _ = planned("color_val.txt", b"a green bench \r\na red car\r\na blue cup")
    assert [i.request.prompt for i in images] == ["a green bench ", "a red car", "a blue cup"]


def test_hpsv2_prompts_are_numbered_in_file_order(planned):
    _, images, _ = planned("anime.json", json.dumps(["a girl", "a \u2603"]).encode())
    assert asked(images) == [("0", "a girl"), ("1", "a \u2603")]


def test_dpg_bench_ids_are_its_file_names(planned, tmp_path):
    (tmp_path / "prompts").mkdir()
    for name, text in {"0": "A cat.", "COCOval2014000000580698": "A bus.\n"}.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    plan, images, _ = planned("prompts")
    assert asked(images) == [("0", "A cat."), ("COCOval2014000000580698", "A bus.")]
    assert [image.source for image in images] == [
        str(tmp_path / "prompts" / f"{image.id}.txt") for image in images
    ]
    assert plan.identity["manifest_kind"] == "item"


def test_the_table_of_dpg_bench_has_one_prompt_per_item(planned):
    plan, images, rejected = planned(
        "dpg_bench.csv",
        b"item_id,text,keywords,proposition_id,dependency\n"
        b'a,"A cat, asleep.",cat,1,0\n'
        b'a,"A cat, asleep.",cat,2,1\n'
        b"b,A bus.,bus,1,0\n"
        b'a,"A cat, asleep.",cat,3,1\n'
        b"b,Another bus.,bus,2,1\n",
    )
    assert asked(images) == [("a", "A cat, asleep."), ("b", "A bus.")]
    assert json.loads(images[0].metadata)["proposition_id"] == "1"
    assert plan.rows == {"blank": 2, "rejected": 1, "accepted": 2}
    assert rejected[0]["line"] == 6
    assert rejected[0]["reason"] == "id 'b' is already used on line 4"


def test_diffusion_db_keeps_seeds_and_sizes_and_leaves_the_rest_to_the_job(planned, tmp_path):
    moment = datetime.datetime(2022, 8, 11, tzinfo=datetime.UTC)
    columns = {
        "image_name": pa.array(["3b19.png", "a4f0.png"]),
        "prompt": pa.array(["a cat", "a dog"]),
        "part_id": pa.array([1, 1], pa.uint16()),
        "seed": pa.array([5, 2**32 - 1], pa.uint32()),
        "step": pa.array([50, 49], pa.uint16()),
        "cfg": pa.array([7.0, 12.0], pa.float32()),
        "sampler": pa.array([8, 9], pa.uint8()),
        "width": pa.array([64, 16], pa.uint16()),
        "height": pa.array([64, 8], pa.uint16()),
        "user_name": pa.array(["x", "y"]),
        "timestamp": pa.array([moment, None], pa.timestamp("ms", "UTC")),
        "image_nsfw": pa.array([0.25, float("nan")], pa.float32()),
        "prompt_nsfw": pa.array([0.5, 2.0], pa.float32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    plan, images, _ = planned("metadata.parquet", steps=3, sampler="euler")
    assert plan.rows["rejected"] == 0
    requests = [image.request for image in images]
    assert [(r.prompt, r.seed, r.width, r.height) for r in requests] == [
        ("a cat", 5, 64, 64),
        ("a dog", 2**32 - 1, 16, 8),
    ]
    assert {(r.steps, r.sampler, r.guidance_scale) for r in requests} == {(3, "euler", 7.5)}
    assert json.loads(images[0].metadata) == {
        "image_name": "3b19.png",
        "part_id": 1,
        "step": 50,
        "cfg": 7.0,
        "sampler": 8,
        "user_name": "x",
        "timestamp": "2022-08-11 00:00:00.000Z",
        "image_nsfw": 0.25,
        "prompt_nsfw": 0.5,
    }
    assert json.loads(images[1].metadata)["image_nsfw"] is None


def test_a_given_prompt_column_takes_precedence(planned):
    plan, images, _ = planned("p.csv", b"caption,prompt\na cat,x\n", prompt_column="caption")
    assert asked(images) == [("0", "a cat")]
    assert images[0].metadata == '{"prompt":"x"}'
    assert plan.identity["prompt_column"] == "caption"


def test_csv_cells_remain_text(planned):
    _, images, _ = planned("p.csv", 'prompt,n,t\r\na,007," 1.50\u00a0"\r\n'.encode())
    assert images[0].metadata == '{"n":"007","t":" 1.50\u00a0"}'
