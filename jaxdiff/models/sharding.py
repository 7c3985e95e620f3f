"""How each network's rules split its parameters over a mesh's `model` axis.

The first rule whose pattern is found in a parameter's dotted path gives the axis that is split; a
parameter without a rule is copied to every device. The layout is Megatron's (Shoeybi et al., 2019,
arXiv:1909.08053): columns, then rows, so that the values in between stay split and only the rows'
products are summed.
"""

Rules = tuple[tuple[str, int], ...]  # (pattern, axis)

# The axis along which a kernel is split: the last one is its outputs, the one before its inputs.
COLUMNS, ROWS = -1, -2
