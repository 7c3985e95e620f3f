"""Image evaluation: benchmarks and their layouts, measures, intervals, comparisons, reports."""
