"""Prints a digest of every program that a command gives to XLA, to compare two commits.

    python -m tools.programs jaxdiff generate --manifest prompts.txt --output /tmp/out

A line for each program: the digest of its StableHLO, how many lines it has, and the function it was
compiled from. Names of functions and places in the source do not count: two commits that print the
same first columns in one environment compute the same.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SYMBOL = re.compile(r'@(?:[\w$.-]+|"[^"]*")')
PLACE = re.compile(r" ?loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)|^#loc.*\n", re.MULTILINE)
RESULT = re.compile(r' ?\{jax\.result_info = "[^"]*"\}')
FILE = re.compile(r"jax_ir\d+_(?:jit_)?(\w+)_compile\.mlir")


def plain(program: str) -> str:
    """The text of a StableHLO module without what a renaming or a moved line changes."""
    program = RESULT.sub("", PLACE.sub("", program))
    names: dict[str, str] = {}
    return SYMBOL.sub(lambda found: names.setdefault(found[0], f"@{len(names)}"), program)


def main(command: list[str]) -> int:
    """Runs the command, prints its programs, and returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="jaxdiff-programs-") as folder:
        environment = os.environ | {"JAX_DUMP_IR_TO": folder, "JAX_DUMP_IR_MODES": "stablehlo"}
        code = subprocess.run(command, env=environment, check=False).returncode
        lines = set()
        for path in Path(folder).iterdir():
            text = plain(path.read_text())
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            lines.add(f"{digest} {text.count(chr(10)):7} {FILE.fullmatch(path.name)[1].strip('_')}")
    print("\n".join(sorted(lines)))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
