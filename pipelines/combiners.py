"""Summaries of images that Beam merges: in constant memory, and in any order with one result.

They are plain functions, which Beam makes its combiners of, ten parts at a time:

    shards | beam.Map(lambda shard: Moments.of(shard.features)) | beam.CombineGlobally(all_moments)

Several at once, in a graph without forks, by `beam.combiners.TupleCombineFn`.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce

import numpy as np

from jaxdiff.evaluation.accumulators import Moments, Sample

NOBODY = np.zeros((0, 0))  # the features of no image


def all_moments(parts: Iterable[Moments]) -> Moments:
    """Those of all images; of count 0 if there are no parts."""
    return reduce(Moments.merge, parts, Moments.of(NOBODY))


def one_sample(parts: Iterable[Sample]) -> Sample:
    """Drawn from all images, of the smallest part's size; empty if there are no parts."""
    return reduce(Sample.merge, parts, Sample.of([], NOBODY, sys.maxsize))


def all_counts(parts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """How often each name was counted in all."""
    return sum(map(Counter, parts), Counter())
