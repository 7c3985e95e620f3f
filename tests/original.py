"""Single-file checkpoints with the keys of real ones and next to no data."""

from jaxdiff.checkpoint.original import ldm
from jaxdiff.checkpoint.single_file_configs import CONTENTS

SD1, XL, REFINER = 768, 2048, 1280
UNET = "model.diffusion_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"


def shapes(width):
    """The keys of a file of a family, each with the smallest shape that its name allows."""
    family = CONTENTS[width]
    found = {}
    for network, prefix in family.prefixes.items():
        for _, key, _ in ldm.names(family.configs[network]):
            found[prefix + key] = (1,)
            if ".in_proj_" in key:
                found[prefix + key] = (3, 2)[: 2 if key.endswith("weight") else 1]
            elif ".attn_1." in key and key.endswith("weight") and ".norm." not in key:
                found[prefix + key] = (2, 2, 1, 1)
            elif key == "text_projection":
                found[prefix + key] = (2, 3)
            elif key.endswith("attn2.to_k.weight"):
                found[prefix + key] = (1, width)
    return found | {CONV_IN: (2, 4, 1, 1)}
