"""Prints a digest of every program that a command compiles with XLA, to compare two commits.

    python -m tools.programs jaxdiff generate --manifest prompts.txt --output /tmp/out

There is one line per program: the digest of its StableHLO, its number of lines, and the function it
was compiled from. The digest ignores function names and source locations: if two commits print the
same first columns in one environment, they compute the same.
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
    """Removes from a StableHLO module what a renamed function or a moved line changes."""
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
