"""What changes images without being asked for is said after planning, and refused by --strict."""

import json

import pytest
from making import make_plan
from transformers import CLIPTokenizer

from jaxdiff import cli
from jaxdiff.dataset.finished import card
from jaxdiff.dataset.manifest import columns, notices
from jaxdiff.dataset.manifest.notices import has_foreign_syntax
from jaxdiff.dataset.run import open_run

LONG = "a red circle above a blue square " * 12


@pytest.fixture
def noticed(tmp_path, tiny_checkpoint):
    """Returns the run that is planned for a manifest with this name and text."""

    def plan(text: str, name: str = "rows.jsonl", **said):
        path = tmp_path / name
        path.write_text(text)
        return make_plan(tmp_path / "out", path, tiny_checkpoint, **said)

    return plan


@pytest.mark.parametrize(
    ("name", "means"),
    [
        (" seed", "seed"),
        ("Seed ", "seed"),
        ("Negative Prompt", "negative_prompt"),
        ("negative-prompt", "negative_prompt"),
        ("neg_prompt", "negative_prompt"),
        ("num_inference_steps", "steps"),
        ("Sampling steps", "steps"),
        ("cfg", "guidance_scale"),
        ("CFG Scale", "guidance_scale"),
        ("num_images_per_prompt", "num_images"),
        ("cfgs", None),
        ("category", None),
    ],
)
def test_near_misses_of_known_columns_are_understood(name, means):
    assert columns.meaning(("prompt", name)) == {"prompt": "prompt", name: means}


def test_of_several_names_for_one_setting_the_nearest_counts():
    names = ("prompt", "cfg_scale", "Guidance Scale", "guidance_scale", "CFG")
    found = columns.meaning(names)
    assert [name for name, means in found.items() if means] == ["prompt", "guidance_scale"]
    found = columns.meaning(("prompt", "steps ", "num_inference_steps"))
    assert found == {"prompt": "prompt", "steps ": "steps", "num_inference_steps": None}


def test_a_csv_with_spaces_in_its_header_gives_the_seeds_and_steps_that_it_names(noticed):
    run = noticed("prompt, seed, num_inference_steps\na star,7,3\n", "rows.csv")
    (image,) = run.planned(0)
    assert (image.request.seed, image.request.steps, image.metadata) == (7, 3, "{}")
    assert run.plan.notices == {}


def test_copied_columns_are_named_and_those_like_settings_apart(noticed):
    rows = [{"prompt": "a", "category": 1, "seeed": 5}, {"prompt": "b", "clip_skip": 2}]
    said = noticed("\n".join(map(json.dumps, rows))).plan.notices
    assert said.keys() == {notices.COPIED, "columns like settings"}
    assert said[notices.COPIED].startswith("'category', 'seeed', 'clip_skip' ")
    assert said["columns like settings"].startswith(
        "'seeed', 'clip_skip': copied, without effect on images; did you mean seed? The columns "
    )


def test_columns_of_a_known_set_and_a_second_prompt_are_not_taken_for_settings():
    names = ("image_name", "prompt", "part_id", "seed", "step", "cfg", "sampler", "width")
    found = columns.copied(names)
    assert found == dict.fromkeys(("image_name", "part_id", "step", "cfg", "sampler"), None)
    assert columns.copied(("prompt", "caption"), "caption") == {"prompt": None}
    assert columns.copied(("prompt", "prompt_2")) == {"prompt_2": "prompt_2"}


def test_lost_tokens_are_counted_as_the_tokenizer_counts_them(noticed, tiny_checkpoint):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    whole = len(tokenizer(LONG)["input_ids"])
    kept = len(tokenizer(LONG, truncation=True)["input_ids"])
    rows = [
        {"prompt": "a star"},
        {"prompt": LONG, "num_images": 2},
        {"prompt": "x", "negative_prompt": LONG},
    ]
    run = noticed("\n".join(map(json.dumps, rows)))
    lost = [image.tokens_lost for image in run.planned(0)]
    assert lost == [0, whole - kept, whole - kept, whole - kept]
    text = run.plan.notices["cut prompts"]
    assert text.startswith("2 rows, the first on line 2 of ")
    assert f"up to {whole - kept} tokens" in text


def test_more_chunks_lose_fewer_tokens(noticed, tiny_checkpoint):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    room = tokenizer.model_max_length - 2
    words = len(tokenizer(LONG, add_special_tokens=False)["input_ids"])
    (image,) = noticed(json.dumps({"prompt": LONG}), prompt_chunks=2).planned(0)
    assert image.tokens_lost == words - 2 * room > 0


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red:1.5) circle",
        "a (red circle: -0.2)",
        "((masterpiece)), a cat",
        "{{best}} cat",
        "a cat <lora:fur:0.8>",
        "a cat BREAK a dog",
        "[a|b] cat",
        "[cat:dog:0.5]",
        "a red++ circle",
        "a (red)1.3 circle",
        "{a|b} cat",
        "a __colour__ cat",
        "a cat --ar 16:9",
        "embedding:easynegative",
    ],
)
def test_other_tools_syntax_is_recognised(prompt):
    assert has_foreign_syntax(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (sitting) on a mat",
        "a [framed] picture: the sea",
        "time 10:30 on a clock (at noon)",
        "C++ written on a wall",
        "an emoticon :)",
        "she said: 'break it'",
        "a well-lit room -- at night",
        "a sign that says {hello}",
    ],
)
def test_ordinary_punctuation_is_no_syntax(prompt):
    assert not has_foreign_syntax(prompt)


def test_syntax_is_counted_in_both_prompts(noticed):
    rows = [
        {"prompt": "a (red:1.5) cat"},
        {"prompt": "a"},
        {"prompt": "b", "negative_prompt": "((x))"},
    ]
    text = noticed("\n".join(map(json.dumps, rows))).plan.notices["syntax of other tools"]
    assert text.startswith("2 rows, the first on line 1 of ")


def test_negative_prompts_without_guidance_are_counted(noticed):
    rows = [{"prompt": "a", "guidance_scale": 1}, {"prompt": "b", "guidance_scale": 2}]
    run = noticed("\n".join(map(json.dumps, rows)), negative_prompt="blur")
    text = run.plan.notices["negative prompts without effect"]
    assert text.startswith("1 row on line 1 of ")
    assert "guidance is off" in text


def test_run_json_keeps_them(finished):
    run = open_run(finished())  # the manifest has the columns `note` and `tags`
    said = json.loads(run.store.read("run.json"))["notices"]
    assert said == run.plan.notices
    assert said[notices.COPIED].startswith("'note', 'tags' ")


def test_the_card_lists_them_without_obeying_their_markdown(noticed):
    plan = noticed('{"prompt": "a", "`*x*`": 1}\n').plan
    text = card.readme(plan, dict.fromkeys(("made", "failed", "accepted", "rejected"), 1))
    assert "- copied columns: ``'`*x*`' (to the images' metadata)``" in text


ROWS = {
    "columns like settings": {"prompt": "a", "seeed": 1},
    "cut prompts": {"prompt": LONG},
    "syntax of other tools": {"prompt": "a (red:1.5) circle"},
    "negative prompts without effect": {
        "prompt": "a",
        "negative_prompt": "b",
        "guidance_scale": 1,
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_strict_refuses_each_of_them(kind, tmp_path, tiny_checkpoint, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text(json.dumps(ROWS[kind]))
    said = ["generate", f"--manifest={path}", f"--output={out}", f"--model={tiny_checkpoint}"]
    assert cli.main([*said, "--width=16", "--height=16", "--strict"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxdiff: --strict: {kind}: ")
    assert not out.exists()


def test_strict_allows_plain_copied_columns_and_a_dry_run_prints_all_notices(
    tmp_path, tiny_checkpoint, capsys
):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "a", "tag": 1}, *ROWS.values()])))
    said = ["generate", f"--manifest={path}", "--output=o", f"--model={tiny_checkpoint}"]
    assert cli.main([*said, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{kind}: " in printed for kind in (notices.COPIED, *ROWS))
