import math
from datetime import date

import numpy as np
import pytest

from jaxdiff.checks import MAX_SIDE_PX, BadValueError
from jaxdiff.dataset.manifest import rows
from jaxdiff.dataset.settings import Settings
from jaxdiff.diffusion.samplers import SAMPLERS
from jaxdiff.request import Request, field_checks

SETTINGS = Settings(
    width=64,
    height=64,
    steps=20,
    guidance_scale=3.0,
    sampler="ddim",
    num_images=2,
    negative_prompt="blur",
)
PLACE = ("rows.jsonl", 13)
PARSER = rows.RowParser(SETTINGS, field_checks(8, MAX_SIDE_PX, tuple(SAMPLERS)))


def parse(**values) -> rows.Row:
    return PARSER.parse({"prompt": "a cat", **values}, 12, PLACE)


def test_missing_values_come_from_the_job():
    row = parse()
    assert row.id == "12"
    assert row.num_images == 2
    assert row.seeds is None
    assert row.request.negative_prompt == "blur"
    assert row.request.steps == 20
    assert row.request.guidance_scale == 3.0
    assert row.metadata == "{}"


def test_the_values_of_a_row_take_precedence():
    row = parse(id=7, seed=3, num_images=3, width=8, steps=1, guidance_scale=0, sampler="euler")
    assert row.id == "7"
    assert list(row.seeds) == [3, 4, 5]
    assert (row.request.width, row.request.height) == (8, 64)
    assert row.request.guidance_scale == 0.0
    assert row.request.sampler == "euler"
    assert parse(negative_prompt="").request.negative_prompt == ""


def test_numbers_may_be_text_and_whole_floats():
    row = parse(seed="5.0", num_images="2", steps=30.0, guidance_scale="2.5", width=" 16 ")
    assert list(row.seeds) == [5, 6]
    assert (row.request.steps, row.request.guidance_scale, row.request.width) == (30, 2.5, 16)


def test_numbers_may_be_numpy_scalars():
    row = parse(id=7.0, seed=np.uint32(5), steps=np.float64(30), guidance_scale=np.float32(2.5))
    assert row.id == "7"
    assert row.seeds[0] == 5
    assert (row.request.steps, row.request.guidance_scale) == (30, 2.5)
    assert {type(row.request.steps), type(row.seeds[0])} == {int}
    assert type(row.request.guidance_scale) is float


@pytest.mark.parametrize("seeds", [[5, 9], "5 9", "[5, 9]", "5,9"])
def test_seeds_make_one_image_each(seeds):
    assert (parse(seeds=seeds).num_images, parse(seeds=seeds).seeds) == (2, (5, 9))


def test_column_names_are_case_insensitive_but_an_exact_match_takes_precedence():
    row = PARSER.parse({"Prompt": "a cat", "Seed": 4, "Note": 1}, 0, PLACE)
    assert row.request.prompt == "a cat"
    assert row.seeds[0] == 4
    assert row.metadata == '{"Note":1}'
    row = PARSER.parse({"Prompt": "kept", "prompt": "used"}, 0, PLACE)
    assert row.request.prompt == "used"
    assert row.metadata == '{"Prompt":"kept"}'


def test_other_columns_are_kept_unchanged():
    row = parse(note="ü", tags=[1, {"a": None}], score=0.1)
    assert row.metadata == '{"note":"ü","tags":[1,{"a":null}],"score":0.1}'


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": None}, "the prompt is empty or missing"),
        ({"prompt": " \t"}, "the prompt is empty or missing"),
        ({"prompt": 3}, "prompt must be text, not 3"),
        ({"prompt": "x" * 4001}, "prompt has 4001 characters; at most 4000"),
        ({"prompt": "a\0b"}, "prompt contains a NUL character"),
        ({"prompt": "a\ud800b"}, "prompt contains the lone surrogate U+D800"),
        ({"prompt": "a\udcffb"}, "prompt contains the byte 0xff, which is not UTF-8"),
        ({"negative_prompt": ["x"]}, "negative_prompt must be text, not ['x']"),
        ({"id": True}, "id must be text, not True"),
        ({"id": 7.5}, "id must be text, not 7.5"),
        ({"id": ""}, "id is empty"),
        ({"id": "x" * 501}, "id has 501 characters"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, not -1"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to 4294967295"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": "1e3"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": [1]}, "seed must be a whole number"),
        ({"seed": "\uff19"}, "seed must be a whole number"),
        ({"seed": 2**32 - 2, "num_images": 3}, "seed 4294967294 and 3 images exceed the"),
        ({"seed": 1, "seeds": [1]}, "the row has both seed and seeds"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"seeds": {"a": 1}}, "seeds must be a list of whole numbers"),
        ({"seeds": [1, "x"]}, "each seed of seeds must be a whole number"),
        ({"seeds": [1, 2], "num_images": 3}, "the row has 2 seeds, but num_images is 3"),
        ({"num_images": 0}, "num_images must be a whole number from 1"),
        ({"num_images": 10**9}, "num_images must be a whole number from 1 to 1000000"),
        (
            {"width": 100},
            "width must be a multiple of 8 for this model, not 100; the nearest is 96",
        ),
        ({"width": 0}, "width must be a whole number from 8"),
        ({"width": 10**6}, "width must be a whole number from 8 to 8192"),
        ({"height": [64]}, "height must be a whole number"),
        ({"steps": 0}, "steps must be a whole number from 1 to 100000, not 0"),
        ({"steps": "many"}, "steps must be a whole number from 1 to 100000, not 'many'"),
        ({"steps": 10**6}, "steps must be a whole number from 1 to 100000, not 1000000"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a number from 0 to 1000, not inf"),
        ({"guidance_scale": "nan"}, "guidance_scale must be a number from 0 to 1000, not 'nan'"),
        ({"guidance_scale": -1}, "guidance_scale must be a number from 0 to 1000"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number from 0 to 1000"),
        ({"sampler": "plms"}, f"sampler must be one of {', '.join(SAMPLERS)}, not 'plms'"),
        ({"sampler": 1}, f"sampler must be one of {', '.join(SAMPLERS)}, not 1"),
        ({"when": date(2026, 1, 1)}, "column 'when': Object of type date is not JSON"),
        ({"score": math.inf}, "column 'score': Out of range float values"),
        ({"note": "\ud800"}, "an extra column contains the lone surrogate U+D800"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(values, reason):
    with pytest.raises(BadValueError) as caught:
        parse(**values)
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_a_rows_request_is_what_request_makes_of_its_values():
    request = parse(
        steps="7", guidance_scale=2, seed=5.0, strength="0.5", init_image="a.png"
    ).request
    same = Request(**vars(request))
    assert request == same
    assert repr(request) == repr(same)  # with which extensions compare rows
