"""Python runs this file when it starts: here a worker of a test that asks for it goes wrong."""

import os
import sys

if "pipelines.worker" in sys.orig_argv:
    exec(os.environ["FAULT"])
