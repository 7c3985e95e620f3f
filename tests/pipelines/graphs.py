"""Inspects Beam graphs."""

from collections import Counter

import apache_beam as beam
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor


def forks(pipeline: beam.Pipeline) -> list[str]:
    """Returns the violations of linearity in a pipeline; an empty list if it is linear.

    It must be linear, because Beam's Dask runner computes only the last transform's inputs, and
    merges tagged outputs.
    """
    found, consumers = [], Counter()

    class Visitor(PipelineVisitor):
        def visit_transform(self, node: AppliedPTransform) -> None:
            consumers.update(node.main_inputs.values())
            if node.side_inputs:
                found.append(f"{node.full_label} has side inputs")
            if tags := sorted(tag for tag in node.outputs if tag is not None):
                found.append(f"{node.full_label} has the tagged outputs {', '.join(tags)}")
            if len(node.main_inputs) > 1:
                found.append(f"{node.full_label} joins {len(node.main_inputs)} inputs")

    pipeline.visit(Visitor())
    twice = [collection for collection, count in consumers.items() if count > 1]
    return found + [f"{c.producer.full_label} is used by {consumers[c]} transforms" for c in twice]
