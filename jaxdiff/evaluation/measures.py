"""Every measure an evaluation can report, and how to read it."""

from jaxdiff.evaluation.records import Measure

# Per image. "correct" is 0 or 1, from the shapes world's exact scorer.
OF_IMAGES = {
    "correct": Measure("correct", is_share=True),
    "clip_score": Measure("CLIPScore"),
    "label": Measure("zero-shot label", is_share=True),
    "sharpness": Measure("sharpness", ""),
    "brightness": Measure("brightness", "", is_share=True),
    "contrast": Measure("contrast", "", is_share=True),
    "colorfulness": Measure("colorfulness", ""),
}
# Per prompt: every image of a prompt has the same value.
OF_PROMPTS = {
    "diversity": Measure("diversity"),
    "near_duplicates": Measure("near-duplicates within a prompt", "lower", is_share=True),
}
# Per set of images.
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
