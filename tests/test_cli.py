import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdiff import cli
from jaxdiff.dataset import planning
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble
from jaxdiff.worlds.shapes import captions, scene
from pipelines import generate_options

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "generate",
    "compile",
    "upscale",
    "inspect",
    "verify",
    "view",
    "sign",
    "train",
    "encode",
    "evaluate",
]


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_help_names_the_commands_and_an_example(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+)  +", said, re.M) == COMMANDS
    assert 'jaxdiff generate --prompt "a red circle above a blue square" --output out/first' in said
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        assert f"usage: jaxdiff {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("jaxdiff ve", ["verify "]),
        ("jaxdiff generate job.toml --ste", ["--steps "]),
        ("jaxdiff upscale in --sampler euler", ["euler", "euler_ancestral"]),
    ],
)
def test_a_shell_completes_commands_options_and_values(tmp_path, line, completed):
    said = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = """
import sys
from jaxdiff import cli
sys.stdout.close()
sys.addaudithook(lambda event, names: event == "import" and names[0] in HEAVY and sys.exit(9))
HEAVY = {"jax", "flax", "torch", "transformers", "apache_beam"}
cli.main()
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, env=os.environ | said, check=False).returncode == 0
    assert (tmp_path / "said").read_text().split("\n") == completed


def test_the_version_is_that_of_the_installed_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxdiff {importlib.metadata.version('jaxdiff')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["make"],
            "unknown command 'make'; the commands are generate, compile, upscale, inspect, ",
        ),
        (["genrate"], "unknown command 'genrate'; did you mean generate?"),
        (["view", "x", "--ouput", "y"], "unknown option --ouput; did you mean --output? (jaxdiff "),
        (["view", "x", "y"], "unexpected 'y' (jaxdiff view --help"),
        (["view", "x", "--sheet", "y.gif"], "--sheet y.gif must end in one of .png, .jpg, .webp"),
        (["view", "/nowhere", "--sheet", "y.png"], "/nowhere holds no jaxdiff run"),
        (
            ["generate", "--prompt=a", "--outdir", "x"],
            "unknown option --outdir; did you mean --output?",
        ),
        (
            ["generate", "--prompt=a\nb", "--output=o"],
            "--prompt 'a\\nb' must be one line of text; repeat --prompt for further prompts",
        ),
        (
            ["generate", "--prompt=a", "--manifest=x.txt", "--output=o"],
            "--prompt replaces --manifest; use one of them",
        ),
        (
            ["evaluate", "--benchmark=shapes", "--output=o", "--vary=step=1,2"],
            "--vary step=1,2: unknown option 'step'; did you mean steps?",
        ),
        (["verify"], "the following arguments are required: DIR (jaxdiff verify --help"),
        (["verify", "/nowhere"], "/nowhere holds no jaxdiff run"),
        (["view", "/nowhere"], "/nowhere holds no jaxdiff run"),
        (["generate"], "--manifest is missing; or give a --prompt (jaxdiff generate --help"),
        (["generate", "--manifest", "x.txt"], "--output is missing"),
        (["generate", "--manfest=x.txt"], "unknown option --manfest; did you mean --manifest?"),
        (["generate", "--promt=a star"], "unknown option --promt; did you mean --prompt?"),
        (
            ["evaluate", "--output", "o", "--bench", "shapes"],
            "unknown option --bench; did you mean",
        ),
        (["generate", "--steps"], "argument --steps: expected one argument"),
        (["generate", "no.toml"], "job file no.toml cannot be read"),
        (["inspect", "/nowhere"], "model '/nowhere' is neither a diffusers directory"),
        (["sign", "x"], "the following arguments are required: --certificate, --key"),
        (["train"], "the following arguments are required: RECIPE.toml, --output"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"jaxdiff: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_control_characters_do_not_reach_the_terminal(capsys):
    assert cli.main(["verify", "/nowhere\x1b[2J\n"]) == 2
    assert capsys.readouterr().err.startswith("jaxdiff: /nowhere\\x1b[2J\\n holds no jaxdiff run")


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
@pytest.mark.parametrize("command", [["generate"], ["train", "--output=/nowhere/x"]])
def test_toml_that_python_cannot_read_is_one_line(capsys, tmp_path, command, value):
    path = tmp_path / "job.toml"
    path.write_text(f"steps = {value}")
    assert cli.main([*command, str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said


def test_debug_shows_a_traceback(capsys):
    assert cli.main(["verify", "/nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_and_the_package_import_nothing_heavy():
    code = """
import sys, jaxdiff
from jaxdiff import cli
cli.main(["--help"])
heavy = {"jax", "flax", "numpy", "pyarrow", "torch", "transformers", "apache_beam"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    assert python("-c", code).returncode == 0


def test_the_pipeline_module_takes_the_same_options():
    ended = python("-m", "pipelines.generate", "--manifest=no.txt", "--output=/nowhere/x")
    same = python("-m", "jaxdiff", "generate", "--manifest=no.txt", "--output=/nowhere/x")
    assert ended.returncode == same.returncode == 2
    assert ended.stderr.splitlines()[-1] == same.stderr.splitlines()[-1]


@pytest.fixture
def job_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "job.toml"
        path.write_text(text)
        return str(path)

    return write


def test_command_line_options_override_the_job_file(job_file):
    path = job_file(
        'manifest = "a.txt"\noutput = "out"\nsteps = 30\nguidance-scale = 2\nstrict = true\n'
    )
    job, rest = generate_options.parse([path, "--steps=7", "--runner", "FlinkRunner"])
    assert (job.manifest, job.output, job.models.model) == ("a.txt", "out", "shapes64")
    assert job.settings == {"steps": "7", "guidance_scale": 2}
    assert (job.strict, job.overwrite) == (True, False)
    assert rest == ["--runner", "FlinkRunner"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes = 3", "unknown option 'stpes'; did you mean --steps?"),
        ("steps = ", "cannot be read"),
        ("manifest = 3", "manifest must be text, not 3"),
        ('strict = "yes"', "strict must be true or false, not 'yes'"),
    ],
)
def test_an_error_in_a_job_file_names_the_file(job_file, text, message):
    with pytest.raises(InputError, match=r"^job file .*job\.toml") as caught:
        generate_options.parse([job_file(text)])
    assert message in str(caught.value)


def test_the_demo_shows_every_template_of_the_shapes_world(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    job, _ = generate_options.parse(["configs/jobs/demo.toml"])
    model = open_ensemble(tiny_checkpoint)
    settings = job_settings.resolve(job.settings, model)
    manifest = manifests.find(job.manifest)
    identity = planning.identify(manifest, settings, model)
    plan = planning.make(
        manifest, settings, model, identity, tmp_path / "plan", models=vars(job.models)
    )
    assert plan.images >= 64
    assert plan.rows["rejected"] == 0
    assert plan.rows["accepted"] >= 32
    words = {"shape": scene.SHAPES, "color": scene.COLORS, "relation": scene.RELATIONS}
    words |= {"number": captions.NUMBERS.values(), "shapes": captions.PLURALS.values()}
    patterns = {}
    for template in captions.TEMPLATES:
        pattern = re.sub(r"\ba\b", "an?", template)
        for name, choices in words.items():
            pattern = pattern.replace(f"{{{name}}}", f"({'|'.join(choices)})")
        patterns[template] = f"{pattern}( on a ({'|'.join(scene.BACKGROUNDS)}) background)?"
    table = pq.read_table(tmp_path / "plan" / plan.images_file).to_pylist()
    for name in ("prompt", "negative_prompt"):
        for text in {row[name] for row in table} - {"", "a black background"}:
            assert any(re.fullmatch(pattern, text) for pattern in patterns.values()), text
    for pattern in patterns.values():
        assert any(re.fullmatch(pattern, row["prompt"]) for row in table), pattern


def test_the_contact_sheet_has_an_image_for_every_prompt(tmp_path, tiny_checkpoint):
    directory = tmp_path / "out"
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n" * 5)
    job = {"manifest": tmp_path / "p.txt", "output": directory, "model": tiny_checkpoint}
    job |= {"steps": 2, "batch-size": 2}
    assert cli.main(["generate", *(f"--{name}={value}" for name, value in job.items())]) == 0
    sheet = directory / "contact_sheet.png"
    assert cli.main(["view", str(directory), "--sheet", str(sheet)]) == 0
    assert not (directory / "gallery").exists()
    with Image.open(sheet) as drawn:
        assert drawn.width > drawn.height > 300
        assert len(drawn.convert("RGB").getcolors(10**7)) > 1000
    assert cli.main(["verify", str(directory)]) == 0
