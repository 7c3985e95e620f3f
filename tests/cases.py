"""Parameters of tests."""

import pytest


def further(*values):
    """Marks a test's parameters as slow: much of what they go through, others do, too."""
    return pytest.param(*values, marks=pytest.mark.slow)
