"""Python runs this file at startup: it injects a test's fault into the workers."""

import os
import sys

if "pipelines.worker" in sys.orig_argv:
    exec(os.environ["FAULT"])
