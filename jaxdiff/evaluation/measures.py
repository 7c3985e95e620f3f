"""Every number that an evaluation can tell, and how it is to be read."""

from jaxdiff.evaluation.records import Measure

# Of an image. "correct" is 0 or 1: what the shapes world's exact scorer says.
OF_IMAGES = {
    "correct": Measure("correct", is_share=True),
    "clip_score": Measure("CLIPScore"),
    "label": Measure("zero-shot label", is_share=True),
    "sharpness": Measure("sharpness", ""),
    "brightness": Measure("brightness", "", is_share=True),
    "contrast": Measure("contrast", "", is_share=True),
    "colorfulness": Measure("colorfulness", ""),
}
# Of a prompt's images, the same value for each of them.
OF_PROMPTS = {
    "diversity": Measure("diversity"),
    "near_duplicates": Measure("near-duplicates among a prompt's images", "lower", is_share=True),
}
# Of all images.
OF_SETS = {
    "cmmd": Measure("CMMD", "lower"),
    "frechet": Measure("Frechet distance", "lower"),
    "kernel": Measure("kernel distance", "lower"),
    "precision": Measure("precision", is_share=True),
    "recall": Measure("recall", is_share=True),
    "exact_copies": Measure("exact copies of the training set", "lower", is_share=True),
    "near_copies": Measure("near-copies of the training set", "lower", is_share=True),
    "directional": Measure("CLIP directional similarity"),
}
ALL = {**OF_IMAGES, **OF_PROMPTS, **OF_SETS}
