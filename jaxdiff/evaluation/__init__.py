"""Judging images: benchmarks and their layouts, measures, intervals, comparisons, reports."""
