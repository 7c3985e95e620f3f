"""`jaxdiff evaluate`: images are scored, measured and written in a benchmark's layout."""

import base64
import json
import re
from pathlib import Path

import clips
import numpy as np
import pytest
from making import FACTS, make_plan
from PIL import Image

from jaxdiff import cli
from jaxdiff.dataset import ledger
from jaxdiff.dataset import shard as shards
from jaxdiff.evaluation import benchmarks, datasets
from jaxdiff.images import image_files
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import Caption, Group

STAR, RING = Caption((Group("star"),)), Caption((Group("ring"),))
PAIR = Caption((Group("star"), Group("ring")), "above")
ASKED = [shapes.row_for(caption) for caption in (STAR, RING, PAIR)]
SHOWN = [STAR, RING, STAR, RING, PAIR, STAR]  # two images per prompt; one of them is right


@pytest.fixture
def dataset(tmp_path, tiny_checkpoint):
    """Makes a dataset of rendered scenes for a benchmark's rows; None means a failed image."""

    def make(
        rows: list[dict] = ASKED, shown: list = SHOWN, benchmark: str = "shapes", **said
    ) -> tuple[Path, Path]:
        asked, manifest = tmp_path / "asked.jsonl", tmp_path / "manifest.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = benchmarks.read(benchmark, asked)
        lines = benchmarks.manifest_rows(prompts, len(shown) // len(rows))
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        said = {"width": 64, "height": 64, "images_per_shard": 4, "batch_size": 1, **said}
        directory = tmp_path / "dataset"
        run = make_plan(directory, manifest, tiny_checkpoint, **said)
        for shard in run.shards:
            with shards.Attempt(run, shard) as attempt:
                for image in run.planned(shard):
                    caption = shown[int(image.key)]
                    if caption is None:
                        attempt.add_failed(image, "not finite")
                        continue
                    random = np.random.default_rng(int(image.key))
                    pixels = shapes.render(shapes.scene_for(caption, random))
                    attempt.add(shards.encode(image, pixels, run.plan))
                attempt.commit(FACTS)
        ledger.finalize(run, 0.0)
        return directory, asked

    return make


def evaluate(directory: Path, asked: Path, output: Path, *more, images: int = 2) -> int:
    """Evaluates a dataset; returns the exit code."""
    said = ["--benchmark", "shapes", "--prompts", asked, "--dataset", directory]
    said += ["--output", output, "--images", images, *more]
    return cli.main(["evaluate", *map(str, said)])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_have_the_format_of_genevals_scorer(dataset, tmp_path):
    output = tmp_path / "out"
    assert evaluate(*dataset(), output) == 0
    results = read_lines(output / "results.jsonl")
    assert [row["correct"] for row in results] == [True, False, False, True, True, False]
    assert results[1]["reason"].startswith("wrong shape")
    assert results[5]["reason"].startswith("too few objects")
    assert set(results[0]) == {
        *("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
    }
    assert [row["tag"] for row in results[::2]] == ["single_object", "single_object", "position"]
    for row, asked in zip(results[::2], ASKED, strict=True):
        assert json.loads(row["metadata"]) == asked
    assert json.loads(results[0]["details"])["objects"][0]["shape"] == "star"
    for number, row in enumerate(results):
        place = f"{number // 2:05d}/samples/{number % 2:04d}.png"
        assert row["filename"] == str(output / place)
        assert Image.open(row["filename"]).size == (64, 64)
        folder = output / f"{number // 2:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text())["prompt"] == row["prompt"]
    report = json.loads((output / "report.json").read_text())
    (run,) = report["runs"]
    overall, *by_tag = run["measures"]["correct"]
    assert (overall["value"], overall["images"]) == (0.5, 6)  # the mean of the tags' means
    assert [(each["category"], each["value"]) for each in by_tag] == [
        ("single_object", 0.5),
        ("position", 0.5),
    ]


def test_existing_scores_are_reused_and_the_report_is_the_same(dataset, tmp_path, capsys):
    made, output = dataset(), tmp_path / "out"
    capsys.readouterr()
    assert evaluate(*made, output) == 0
    *_, score, where = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".+: 50\.0% correct \(95% interval [\d.]+ to [\d.]+\)", score)
    assert where == f"Report: {output}/report.html"
    names = ("report.json", "report.md", "report.html", "results.jsonl")
    before = {name: (output / name).read_bytes() for name in names}
    files = sorted((output / "scores").glob("*.parquet"))
    assert len(files) == 2
    times = [path.stat().st_mtime_ns for path in files]
    files[1].write_bytes(files[1].read_bytes()[:100])  # as if the write had been interrupted
    assert evaluate(*made, output) == 0
    assert {name: (output / name).read_bytes() for name in names} == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(files, times, strict=True)] == [
        True,
        False,
    ]


def test_the_best_image_of_each_prompt_is_kept_with_all_scores(dataset, tmp_path):
    assert evaluate(*dataset(), tmp_path / "out", "--keep", "best:shapes") == 0
    kept = read_lines(tmp_path / "out" / "best" / "metadata.jsonl")
    assert [(row["prompt"], row["index"]) for row in kept] == [
        ("a star", 0),
        ("a ring", 1),
        ("a star above a ring", 0),
    ]
    assert [[each["correct"] for each in row["scores"]] for row in kept] == [
        [1.0, 0.0],
        [0.0, 1.0],
        [1.0, 0.0],
    ]
    for row in kept:
        assert Image.open(tmp_path / "out" / "best" / row["file_name"]).size == (64, 64)


def test_a_failed_image_is_wrong_and_prevents_the_layout(dataset, tmp_path, capsys):
    output = tmp_path / "out"
    assert evaluate(*dataset(shown=[STAR, None, RING, RING, PAIR, PAIR]), output) == 3
    assert "layout geneval was not written" in capsys.readouterr().err
    assert not (output / "00000").exists()
    results = read_lines(output / "results.jsonl")
    assert [row["reason"] for row in results] == ["", "not made", "", "", "", ""]
    report = json.loads((output / "report.json").read_text())
    assert report["runs"][0]["failed"] == 1


def test_images_are_compared_with_a_reference_and_a_training_set(dataset, tmp_path):
    directory, asked = dataset()
    whole = {}
    for name, folder in (("itself", directory), ("others", tmp_path / "others")):
        if name == "others":
            folder.mkdir()
            with (folder / "metadata.jsonl").open("w") as file:
                for number in range(8):
                    scene, text = shapes.sample(np.random.default_rng(100 + number))
                    Image.fromarray(shapes.render(scene)).save(folder / f"{number}.png")
                    file.write(json.dumps({"file_name": f"{number}.png", "text": text}) + "\n")
        said = ["--reference", folder, "--training", folder]
        assert evaluate(directory, asked, tmp_path / name, *said) == 0
        whole[name] = json.loads((tmp_path / name / "report.json").read_text())["runs"][0]["whole"]
    assert whole["itself"]["exact_copies"] == whole["itself"]["near_copies"] == 1.0
    assert whole["itself"]["precision"] == whole["itself"]["recall"] == 1.0
    assert whole["itself"]["frechet"] == pytest.approx(0.0, abs=1e-6)
    assert whole["others"]["exact_copies"] == 0.0
    assert whole["others"]["frechet"] > 0.1


def test_clip_measures_are_reported_or_named_as_missing(dataset, tmp_path, capsys):
    directory, asked = dataset(
        rows=[{"prompt": text, "id": str(n)} for n, text in enumerate(("a star", "a ring"))],
        shown=[STAR, STAR, RING, RING],
        benchmark="prompts",
    )
    model = clips.write_transformers(tmp_path / "clip", clips.OPENAI)
    command = ["evaluate", "--benchmark", "prompts", "--prompts", str(asked), "--images", "2"]
    command += ["--dataset", str(directory), "--output"]
    assert cli.main([*command, str(tmp_path / "without")]) == 0
    assert "no clip_score: needs --clip DIR" in capsys.readouterr().err
    (run,) = json.loads((tmp_path / "without" / "report.json").read_text())["runs"]
    assert "clip_score" in run["missing"]
    assert "sharpness" in run["measures"]

    output, keep = tmp_path / "with", ["--clip", str(model), "--keep", "best:clip"]
    assert cli.main([*command, str(output), *keep]) == 0
    (run,) = json.loads((output / "report.json").read_text())["runs"]
    assert run["missing"] == {}
    assert {"clip_score", "diversity", "near_duplicates"} <= set(run["measures"])
    for row in read_lines(output / "best" / "metadata.jsonl"):
        scores = [each["clip_score"] for each in row["scores"]]
        assert scores[row["index"]] == max(scores)


def test_models_and_settings_are_compared_at_equal_seeds(tmp_path, tiny_checkpoint):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a star\na ring\n")
    said = ["--benchmark", "prompts", "--prompts", prompts, "--model", tiny_checkpoint]
    said += ["--vary", "steps=1,2", "--images", 2, "--output", output]
    assert cli.main(["evaluate", *map(str, said)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["tiny steps=1", "tiny steps=2"]
    told = [run["told"] for run in report["runs"]]
    assert [each["steps"] for each in told] == ["1", "2"]
    assert [each["evaluations per image"] for each in told] == ["2", "4"]  # guided
    once, twice = (float(each["operations per image"]) for each in told)
    assert once < twice < 2 * once  # both decode once
    (comparison,) = report["comparisons"]
    assert comparison["pairs"] == 4
    assert {path.name for path in output.iterdir() if path.is_dir()} == {
        "tiny-steps-1",
        "tiny-steps-2",
    }
    # The page has each pair that differs side by side: the first run's image, then the second's.
    groups = [group for groups in comparison["differing"].values() for group in groups]
    keys = [image["key"] for each in groups for pair in each["largest"] for image in pair["images"]]
    files = [
        {each.key: each.image for each in datasets.of_dataset(output / name / "dataset")}
        for name in ("tiny-steps-1", "tiny-steps-2")
    ]
    body = (output / "report.html").read_text().split("<body>")[1]
    shown = re.findall(r'base64,([^"]+)"', body)
    assert len(keys) == len(shown) >= 4
    for number, (key, thumbnail) in enumerate(zip(keys, shown, strict=True)):
        pixels = image_files.decode(base64.b64decode(thumbnail))
        assert np.array_equal(pixels, image_files.decode(files[number % 2][key]))


def test_a_dataset_is_exported_without_being_scored(dataset, tmp_path):
    directory, _ = dataset()
    said = ["--export", "geneval", "--dataset", directory, "--output", tmp_path / "out"]
    assert cli.main(["evaluate", *map(str, said)]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000", "00001", "00002"]
    said[1] = "dpg"
    said[-1] = tmp_path / "other"
    assert cli.main(["evaluate", *map(str, said)]) == 2
    assert not (tmp_path / "other").exists()


def test_an_existing_layout_is_scored(dataset, tmp_path, capsys):
    directory, asked = dataset()
    exported, output = tmp_path / "exported", tmp_path / "out"
    said = ["--export", "geneval", "--dataset", directory, "--output", exported]
    assert cli.main(["evaluate", *map(str, said)]) == 0
    said = ["--benchmark", "shapes", "--prompts", asked, "--layout", exported]
    said = ["evaluate", *map(str, said), "--images", "2", "--output", str(output)]
    assert cli.main(said) == 0
    results = read_lines(output / "results.jsonl")
    assert [row["correct"] for row in results] == [True, False, False, True, True, False]
    missing = exported / "00001" / "samples" / "0001.png"
    missing.unlink()
    capsys.readouterr()
    assert cli.main(said) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(missing) in said


def test_datasets_are_compared(dataset, tmp_path, capsys):
    folders = []
    for name, shown in (("A", SHOWN), ("B", [RING, RING, *SHOWN[2:]])):
        directory, asked = dataset(shown=shown)
        folders.append(directory.rename(tmp_path / name))
    output = tmp_path / "out"
    assert evaluate(folders[0], asked, output, "--dataset", folders[1]) == 0
    assert "B compared with A: correct: " in capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["A", "B"]
    lost, won = report["comparisons"][0]["differing"]["correct"]
    assert (lost["higher"], lost["pairs"], won["pairs"]) == ("A", 1, 0)
    assert [image["key"] for image in lost["largest"][0]["images"]] == ["000000000"] * 2
    assert (output / "A" / "results.jsonl").exists()
    assert (output / "B" / "results.jsonl").exists()


def test_datasets_of_any_manifest_are_compared_without_its_file(tmp_path, tiny_checkpoint, capsys):
    folders = []
    for name, text in (("A", "a star\na ring\n"), ("B", "a star\na ring\n"), ("C", "x\ny\n")):
        manifest = tmp_path / f"{name}.txt"
        manifest.write_text(text)
        run = make_plan(tmp_path / name, manifest, tiny_checkpoint, num_images=3, batch_size=1)
        with shards.Attempt(run, 0) as attempt:
            for image in run.planned(0):
                pixels = np.full((16, 16, 3), ord(name), np.uint8)
                attempt.add(shards.encode(image, pixels, run.plan))
            attempt.commit(FACTS)
        ledger.finalize(run, 0.0)
        folders.append(str(tmp_path / name))
    a, b, other = folders
    said = ["evaluate", "--benchmark", "prompts", "--output", str(tmp_path / "out"), "--dataset", a]
    assert cli.main([*said, "--dataset", b]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(run["name"], run["prompts"], run["images"]) for run in report["runs"]] == [
        ("A", 2, 6),
        ("B", 2, 6),
    ]
    assert report["comparisons"][0]["pairs"] == 6
    capsys.readouterr()
    for output, more in ((a, []), (str(tmp_path), ["--dataset", b])):  # whose folders are A and B
        assert cli.main([*said, *more, "--output", output]) == 2
        assert f"--output: {a} is a dataset" in capsys.readouterr().err
    assert cli.main(["verify", a]) == 0
    assert cli.main([*said, "--dataset", other]) == 2
    assert f"{other} has other prompts than {a}; compare datasets" in capsys.readouterr().err


def test_a_dataset_of_other_prompts_is_not_judged(dataset, tmp_path, capsys):
    directory, _ = dataset([{"prompt": "a star"}], [STAR], benchmark="prompts")
    capsys.readouterr()
    said = ["--benchmark", "shapes", "--dataset", directory, "--output", tmp_path / "out"]
    assert cli.main(["evaluate", *map(str, said)]) == 2
    said = capsys.readouterr().err
    assert "image 000000000 has the prompt 'a star', which is not a row of the shapes" in said


MISTAKES = {
    "": "--output is missing",
    "--output o": "--benchmark is missing; choose from shapes, geneval",
    "--benchmark genval --output o": "invalid choice: 'genval'",
    "--benchmark geneval --output o": "--benchmark geneval needs --prompts: prompts/evaluation_",
    "--benchmark shapes --output o --vary stepps=1,2": "unknown option 'stepps'",
    "--benchmark shapes --output o --keep best:clip": "--keep best:clip needs --clip",
    "--benchmark shapes --output o --clip nowhere": "nowhere",
    "--benchmark shapes --output o --reference nowhere": "nowhere: image folder not found",
    "--benchmark shapes --output o --vary steps=2,x": "steps",
    "--benchmark shapes --output o --model shapes64 --model nowhere": "nowhere",
    "--benchmark prompts --output o --dataset d --images 2": "--images: the dataset says how many",
    "--benchmark shapes --output o --dataset d --model m": "--model and --vary generate images",
    "--benchmark shapes --output o --dataset nowhere": "nowhere is not a jaxdiff generate dataset",
    "--benchmark shapes --output o --steps many": "steps",
    "--export geneval --output o": "--export needs one --dataset",
    "--benchmark prompts --output o --prompt a": "--prompts names a file",
    "--benchmark shapes --output o --images 0": "must be a whole number from 1",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_an_error_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert MISTAKES[words] in said
    assert list(tmp_path.iterdir()) == []
