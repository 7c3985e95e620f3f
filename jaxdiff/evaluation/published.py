"""Published scores of well-known models, shown next to your own scores.

Each row is copied from its source. PartiPrompts and DrawBench have no scorer of their own, so they
have no table.
"""

from collections.abc import Sequence

from jaxdiff.evaluation.report.report import Table

GENEVAL = ("GenEval's README", "https://github.com/djghosh13/geneval")
HPSV2 = ("HPSv2's README, v2.1", "https://github.com/tgxs002/HPSv2")
BAGEL = ("Lumina-DiMOO, arXiv:2510.06308", "https://arxiv.org/abs/2510.06308")
ELLA = ("ELLA, arXiv:2403.05135", "https://arxiv.org/abs/2403.05135")
ERNIE = ("ERNIE-Image's model card", "https://huggingface.co/baidu/ERNIE-Image")
JANUS_FLOW = ("JanusFlow, arXiv:2411.07975", "https://arxiv.org/abs/2411.07975")
JANUS_PRO = ("Janus-Pro, arXiv:2501.17811", "https://arxiv.org/abs/2501.17811")
QWEN = ("Qwen-Image, arXiv:2508.02324", "https://arxiv.org/abs/2508.02324")
SANA = ("Sana, arXiv:2410.10629", "https://arxiv.org/abs/2410.10629")
SD3 = ("SD3, arXiv:2403.03206", "https://arxiv.org/abs/2403.03206")
TOKEN_FLOW = ("TokenFlow, arXiv:2412.03069", "https://arxiv.org/abs/2412.03069")
Z_IMAGE = ("Z-Image, arXiv:2511.22699", "https://arxiv.org/abs/2511.22699")


def _table(
    columns: Sequence[str], groups: Sequence[tuple[tuple[str, str], Sequence[tuple]]], note: str
) -> Table:
    """Builds a table from rows grouped by source."""
    return Table(
        title="Published scores",
        note=note,
        columns=("model", *columns),
        rows=[row for _, rows in groups for row in rows],
        sources=[source for source, rows in groups for _ in rows],
    )


PUBLISHED = {
    "geneval": _table(
        (
            *("overall", "single_object", "two_object", "counting", "colors", "position"),
            "color_attr",
        ),
        (
            (
                GENEVAL,
                (
                    ("CLIP retrieval", 0.35, 0.89, 0.22, 0.37, 0.62, 0.03, 0.00),
                    ("minDALL-E", 0.23, 0.73, 0.11, 0.12, 0.37, 0.02, 0.01),
                    ("Stable Diffusion 1.5", 0.43, 0.97, 0.38, 0.35, 0.76, 0.04, 0.06),
                    ("Stable Diffusion 2.1", 0.50, 0.98, 0.51, 0.44, 0.85, 0.07, 0.17),
                    ("Stable Diffusion XL", 0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23),
                    ("IF-XL", 0.61, 0.97, 0.74, 0.66, 0.81, 0.13, 0.35),
                ),
            ),
            (
                TOKEN_FLOW,
                (
                    ("PixArt-alpha", 0.48, 0.98, 0.50, 0.44, 0.80, 0.08, 0.07),
                    ("DALL-E 2", 0.52, 0.94, 0.66, 0.49, 0.77, 0.10, 0.19),
                ),
            ),
            (
                SD3,
                (
                    ("DALL-E 3", 0.67, 0.96, 0.87, 0.47, 0.83, 0.43, 0.45),
                    ("SD3, depth 24, 512 px", 0.62, 0.98, 0.74, 0.63, 0.67, 0.34, 0.36),
                    ("SD3, depth 38, 512 px, DPO", 0.71, 0.98, 0.89, 0.73, 0.83, 0.34, 0.47),
                    ("SD3, depth 38, 1024 px, DPO", 0.74, 0.99, 0.94, 0.72, 0.89, 0.33, 0.60),
                ),
            ),
            (SANA, (("Sana 1.6B", 0.66, 0.99, 0.77, 0.62, 0.88, 0.21, 0.47),)),
            (JANUS_PRO, (("Janus-Pro-7B", 0.80, 0.99, 0.89, 0.59, 0.90, 0.79, 0.66),)),
            (BAGEL, (("BAGEL", 0.82, 0.99, 0.94, 0.81, 0.88, 0.64, 0.63),)),
            (
                QWEN,
                (
                    ("FLUX.1-dev", 0.66, 0.98, 0.81, 0.74, 0.79, 0.22, 0.45),
                    ("HiDream-I1-Full", 0.83, 1.00, 0.98, 0.79, 0.91, 0.60, 0.72),
                    ("GPT Image 1 (high)", 0.84, 0.99, 0.92, 0.85, 0.92, 0.75, 0.61),
                    ("Qwen-Image", 0.87, 0.99, 0.92, 0.89, 0.88, 0.76, 0.77),
                ),
            ),
            (Z_IMAGE, (("Z-Image", 0.84, 1.00, 0.94, 0.78, 0.93, 0.62, 0.77),)),
            (
                ERNIE,
                (
                    ("FLUX.2-klein-9B", 0.85, 0.93, 0.96, 0.83, 0.91, 0.72, 0.74),
                    ("ERNIE-Image", 0.89, 1.00, 0.96, 0.78, 0.93, 0.86, 0.79),
                ),
            ),
        ),
        "From GenEval's own scorer, which needs its detector, with the original prompts, not "
        "rewritten by a language model. Others list the SD3 rows of depth 24 and of depth 38 at "
        "512 px as SD3 Medium and SD3.5 Large.",
    ),
    "t2i-compbench": _table(
        ("color", "shape", "texture", "spatial", "non_spatial"),
        (
            (
                ELLA,
                (
                    ("Stable Diffusion 1.4", 0.3765, 0.3576, 0.4156, 0.1246, 0.3079),
                    ("Stable Diffusion 1.5", 0.3750, 0.3724, 0.4159, 0.1204, 0.3088),
                    ("Stable Diffusion 2", 0.5065, 0.4221, 0.4922, 0.1342, 0.3096),
                    ("Stable Diffusion XL", 0.6369, 0.5408, 0.5637, 0.2032, 0.3110),
                    ("GORS", 0.6603, 0.4785, 0.6287, 0.1815, 0.3193),
                    ("DALL-E 2", 0.5750, 0.5464, 0.6374, 0.1283, 0.3043),
                    ("PixArt-alpha", 0.6886, 0.5582, 0.7044, 0.2082, 0.3179),
                ),
            ),
        ),
        "From the scorers of the first version: BLIP-VQA for color, shape and texture, UniDet for "
        "spatial, and the cosine of CLIP ViT-B/32 for non_spatial. T2I-CompBench++ differs.",
    ),
    "dpg": _table(
        ("overall", "global", "entity", "attribute", "relation", "other"),
        (
            (
                ELLA,
                (
                    ("Stable Diffusion 1.5", 63.18, 74.63, 74.23, 75.39, 73.49, 67.81),
                    ("Stable Diffusion 2", 68.09, 77.67, 78.13, 74.91, 80.72, 80.66),
                    ("PixArt-alpha", 71.11, 74.97, 79.32, 78.60, 82.57, 76.96),
                    ("Playground 2", 74.54, 83.61, 79.91, 82.67, 80.62, 81.22),
                    ("Stable Diffusion XL", 74.65, 83.27, 82.43, 80.91, 86.76, 80.41),
                    ("DALL-E 3", 83.50, 90.97, 89.61, 88.39, 90.58, 89.83),
                ),
            ),
            (
                JANUS_FLOW,
                (
                    ("JanusFlow-1.3B", 80.09, 87.03, 87.31, 87.39, 89.79, 88.10),
                    ("PixArt-Sigma", 80.54, 86.89, 82.89, 88.94, 86.59, 87.68),
                    ("Emu3-Gen", 80.60, 85.21, 86.68, 86.84, 90.22, 83.15),
                ),
            ),
            (
                JANUS_PRO,
                (
                    ("SD3 Medium", 84.08, 87.90, 91.01, 88.83, 80.70, 88.68),
                    ("Janus-Pro-7B", 84.19, 86.90, 88.90, 89.40, 89.32, 89.48),
                ),
            ),
            (BAGEL, (("BAGEL", 85.07, 88.94, 90.37, 91.29, 90.82, 88.67),)),
            (
                QWEN,
                (
                    ("FLUX.1-dev", 83.84, 74.35, 90.00, 88.96, 90.87, 88.33),
                    ("GPT Image 1 (high)", 85.15, 88.89, 88.94, 89.84, 92.63, 90.96),
                    ("HiDream-I1-Full", 85.89, 76.44, 90.22, 89.48, 93.74, 91.83),
                    ("Qwen-Image", 88.32, 91.32, 91.56, 92.02, 94.31, 92.73),
                ),
            ),
            (Z_IMAGE, (("Z-Image", 88.14, None, None, None, None, None),)),
        ),
        "From DPG-Bench's own scorer, mPLUG-large. Its category scores count one image of four. "
        "For the same model, papers differ by about a point.",
    ),
    "hpsv2": _table(
        ("average", "anime", "concept-art", "paintings", "photo"),
        (
            (
                HPSV2,
                (
                    ("SDXL Refiner 0.9", 31.34, 33.26, 32.07, 31.63, 28.38),
                    ("SDXL Base 0.9", 30.63, 32.84, 31.36, 30.86, 27.48),
                    ("Deliberate", 30.23, 31.46, 30.48, 30.17, 28.83),
                    ("Realistic Vision", 29.89, 31.01, 29.95, 30.00, 28.61),
                    ("Dreamlike Photoreal 2.0", 29.73, 30.87, 29.75, 29.46, 28.85),
                    ("Openjourney", 27.48, 28.37, 27.38, 27.53, 26.66),
                    ("DeepFloyd-XL", 26.88, 27.71, 26.07, 25.79, 27.96),
                    ("Stable Diffusion 2.0", 26.38, 27.09, 26.02, 25.68, 26.73),
                    ("Stable Diffusion 1.4", 25.35, 26.03, 24.87, 24.80, 25.70),
                    ("DALL-E 2", 25.34, 26.38, 24.51, 24.93, 25.55),
                    ("Latent Diffusion", 20.34, 20.63, 19.65, 19.79, 21.26),
                    ("GLIDE", 14.51, 13.90, 13.50, 13.94, 16.72),
                ),
            ),
        ),
        'From hpsv2.evaluate(DIR, hps_version="v2.1"); v2.0 scores are not comparable.',
    ),
}
