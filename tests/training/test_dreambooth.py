"""The class images are a finished dataset of the job's, made once."""

import pytest

from jaxdiff.dataset import ledger
from jaxdiff.dataset import plan as plans
from jaxdiff.errors import InputError
from jaxdiff.training import data, dreambooth
from jaxdiff.training.recipe import Data, Prior


def test_class_images_are_made_once_and_can_be_trained_on(tiny_checkpoint, tmp_path, capsys):
    prior = Prior(prompt="a shape", images=3)
    directory = dreambooth.class_images(str(tiny_checkpoint), prior, tmp_path / "prior")
    assert ledger.finished(directory, plans.load(directory))["made"] == 3
    examples = data.open_examples(Data(path=str(directory)))
    assert [examples.captions[i] for i in range(len(examples))] == ["a shape"] * 3
    capsys.readouterr()
    assert dreambooth.class_images(str(tiny_checkpoint), prior, tmp_path / "prior") == directory
    assert "is finished already" in capsys.readouterr().out


def test_class_images_need_a_model_and_a_number(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="the recipe names no model"):
        dreambooth.class_images("", Prior(prompt="a shape"), tmp_path)
    with pytest.raises(InputError, match="num_images must be a whole number"):
        dreambooth.class_images(str(tiny_checkpoint), Prior("a shape", 0), tmp_path / "none")
