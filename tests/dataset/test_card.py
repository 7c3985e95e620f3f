"""The dataset card, and `croissant.json` in Croissant's own validator."""

import json
from dataclasses import replace
from pathlib import Path

import mlcroissant
import pytest
import yaml

from jaxdiff.dataset import formats
from jaxdiff.dataset.finished import card
from jaxdiff.dataset.run import open_run

MISSING_DATE = '"https://schema.org/datePublished" is recommended'
HOSTILE = '`a|b`` --- "c": {d} <script>\n---\n\x07\x85\u2028\udcff\ufffe💥 [x](y)'


def front_matter(text: str) -> dict:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_card_lists_counts_and_settings(finished):
    directory = finished(failing=["000000001", "000000005"])
    text = (directory / "README.md").read_text()
    run = open_run(directory)
    for said in (
        "| images | 7 |",
        "| images that failed | 2, see `failed.jsonl` |",
        "| rejected rows | 1, see `rejected.jsonl` |",
        f"| its fingerprint | `{run.plan.identity['model']}` |",
        f"| steps | `{run.plan.settings.steps}` |",
    ):
        assert said in text
    assert front_matter(text)["pretty_name"] == "7 images by tiny"


@pytest.mark.parametrize("format_", formats.FORMATS)
def test_the_card_explains_how_to_load_its_format(finished, format_):
    directory = finished(format=format_)
    text = (directory / "README.md").read_text()
    (config,) = front_matter(text)["configs"]
    ((data_files),) = config["data_files"]
    assert {path.parts[0] for path in map(Path, [data_files["path"]])} == {"data"}
    assert list(directory.glob(data_files["path"]))
    assert ("import webdataset" in text) == (format_ == "webdataset")
    assert ("train-{00000..00002}.tar" in text) == (format_ == "webdataset")


def test_a_licence_is_stated_only_where_it_is_known(finished):
    directory = finished()
    run = open_run(directory)
    counts = {"made": 9, "failed": 0, "accepted": 5, "rejected": 1}
    bundled = {"model": "shapes64", "variant": None, "refiner": None}
    for models, license in (
        (run.plan.models, "unknown"),
        (bundled, "apache-2.0"),
        ({**bundled, "refiner": "another"}, "unknown"),
    ):
        text = card.readme(replace(run.plan, models=models), counts)
        assert front_matter(text)["license"] == license
        assert ("knows none for these images" in text) == (license == "unknown")
        described = json.loads(card.croissant(replace(run.plan, models=models)))["license"]
        assert ("apache.org" in described) == (license == "apache-2.0")


def test_no_name_or_setting_breaks_the_card(finished):
    run = open_run(finished())
    plan = replace(
        run.plan, model_name=HOSTILE, identity={**run.plan.identity, "negative_prompt": HOSTILE}
    )
    text = card.readme(plan, {"made": 9, "failed": 0, "accepted": 5, "rejected": 1})
    shown = '`a|b`` --- "c": {d} <script>�---������💥 [x](y)'
    assert front_matter(text)["pretty_name"] == f"9 images by {shown}"
    assert f"\n# 9 images by ``` {shown} ```\n" in text
    cell = shown.replace("|", "\\|")
    assert f"\n| negative_prompt | ``` {cell} ``` |\n" in text
    assert json.loads(card.croissant(plan))["description"].endswith(shown)


def test_the_card_names_the_images_that_others_begin_with(finished):
    plan = open_run(finished()).plan
    counts = {"made": 9, "failed": 0, "accepted": 5, "rejected": 1}
    text = card.readme(replace(plan, takes_images=True), counts)
    assert card.SOURCES in text
    for column in ("init_image", "mask_image", "control_image", "init_image_sha256"):
        assert f"`{column}`" in card.SOURCES
    assert "begins with another" not in card.readme(plan, counts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mlcroissant's own calls
@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("format_", formats.FORMATS)
def test_croissant_is_valid_and_names_the_existing_files(finished, format_, image_format):
    directory = finished(format=format_, image_format=image_format, failing=["000000002"])
    dataset = mlcroissant.Dataset(str(directory / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    (warning,) = dataset.metadata.ctx.issues.warnings  # the file contains no date
    assert MISSING_DATE in warning
    for files in dataset.metadata.distribution:
        (pattern,) = files.includes
        images = pattern.startswith("data/") and format_ == "imagefolder"
        assert len(list(directory.glob(pattern))) == (8 if images else 3)
    records = list(dataset.records("images"))
    assert [record["images/key"] for record in records] == [b"%09d" % key for key in range(9)]
    assert [record["images/status"] == b"made" for record in records] == [
        key != 2 for key in range(9)
    ]
    assert records[4]["images/prompt"].decode() == "ein grüner Stern 🌟"
    assert records[2]["images/bytes"] is None
    assert isinstance(records[3]["images/bytes"], int)
