"""CLIP's embeddings, logits, pixels and score match transformers and torchmetrics."""

import clips
import numpy as np
import pytest
from PIL import Image

from jaxdiff.evaluation import clip_checkpoint, clip_measures

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
multimodal = pytest.importorskip("torchmetrics.functional.multimodal")

from transformers.models.clip.image_processing_pil_clip import (  # noqa: E402
    CLIPImageProcessorPil,
)

pytestmark = pytest.mark.usefixtures("compiled_faster")
BOUND = 2e-5  # of the difference, relative to the reference's norm


@pytest.fixture(scope="module", params=["OPENAI", "OPEN_CLIP"])
def both(request, tmp_path_factory):
    """Returns our CLIP, and transformers' network and processor, all from one directory."""
    directory = tmp_path_factory.mktemp("clip") / request.param
    clips.write_transformers(directory, getattr(clips, request.param))
    network = transformers.CLIPModel.from_pretrained(directory).eval()
    processor = transformers.CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(directory),
        transformers.CLIPTokenizer.from_pretrained(directory),
    )
    return clip_measures.open_clip(directory, batch_size=3), network, processor


def test_embeddings_and_logits(both):
    ours, network, processor = both
    seen = processor(images=[Image.fromarray(image) for image in clips.images()])
    read = processor(text=clips.TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = network(pixel_values=torch.tensor(np.stack(seen["pixel_values"])), **read)
    images, texts = ours.embed_images(clips.images()), ours.embed_texts(clips.TEXTS)
    logits = ours.logit_scale * images @ texts.T
    for found, expected in (
        (images, theirs.image_embeds),
        (texts, theirs.text_embeds),
        (logits, theirs.logits_per_image),
        (
            clip_measures.zero_shot(images, texts, ours.logit_scale),
            theirs.logits_per_image.softmax(1),
        ),
    ):
        difference = np.linalg.norm(found - expected.numpy())
        assert found.shape == expected.shape
        assert difference <= BOUND * np.linalg.norm(expected.numpy())


def test_files_written_by_transformers_are_read(both, tmp_path):
    """Version 5 writes the processor's config to another file than earlier versions."""
    _, network, processor = both
    read = clip_checkpoint.find(network.name_or_path)
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = clip_checkpoint.find(tmp_path)
    assert (again.config, again.pixels) == (read.config, read.pixels)
    for key, tensor in read.tensors.items():
        np.testing.assert_array_equal(again.tensors[key].read(), tensor.read())


def test_pixels_match_the_processors_bit_for_bit(both):
    ours, _, processor = both
    for image in clips.images():
        seen = processor.image_processor(
            Image.fromarray(image), do_rescale=False, do_normalize=False
        )
        theirs = np.asarray(seen["pixel_values"][0]).transpose(1, 2, 0)
        np.testing.assert_array_equal(clip_measures.centre_of_resized(image, ours.size), theirs)


class OfTransformers4:
    """Adapts the network to torchmetrics, which expects features as in transformers 4."""

    def __init__(self, network):
        self.network, self.config = network, network.config

    def to(self, device):
        return self

    def get_image_features(self, pixels):
        return self.network.get_image_features(pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.network.get_text_features(ids, mask).pooler_output


def test_clip_score_matches_torchmetrics(both):
    ours, network, processor = both
    texts = ["a red circle", "a star above a circle", "a ring"]  # it cuts off longer texts' end
    images = clips.images()[:3]
    ours = clip_measures.clip_score(ours.embed_images(images), ours.embed_texts(texts))
    for image, text, score in zip(images, texts, ours, strict=True):
        with torch.no_grad():
            theirs = multimodal.clip_score(
                torch.tensor(image.transpose(2, 0, 1)),
                text,
                model_name_or_path=lambda: (OfTransformers4(network), processor),
            )
        assert score == pytest.approx(float(theirs), abs=1e-3)
