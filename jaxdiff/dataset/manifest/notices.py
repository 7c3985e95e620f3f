"""Counts what a job will do that a manifest's author may not expect, for a summary of the plan."""

import itertools
import re
from collections.abc import Collection, Iterable

from jaxdiff import checks
from jaxdiff.dataset.manifest import columns
from jaxdiff.families.family import CLASSIFIER_FREE, UNGUIDED
from jaxdiff.request import Request

# Prompt syntax of other tools. Here, every prompt is encoded as it is written.
FOREIGN_SYNTAX = re.compile(
    r"""
      \([^()]*:\s*[+-]?[0-9]*\.?[0-9]+\s*\)            # (word:1.5), attention in most interfaces
    | \(\([^()]+\)\) | \{\{[^{}]+\}\}                  # ((word)), {{word}}
    | \)[0-9]*\.[0-9]+ | [a-z)]{2}\+\+(?=[\s,.]|$)      # (word)1.5 and word++ of compel
    | <(?:lora|lyco|hypernet|embedding):[^<>]+>        # <lora:name:0.8>
    | \bembedding:\w+                                  # of ComfyUI
    | \bBREAK\b                                        # chunks of AUTOMATIC1111's web UI
    | \[[^][|]*\|[^][]*\] | \[[^][]*:[0-9.]+\]         # [a|b] and [a:b:0.5], changed by step
    | \{[^{}|]*\|[^{}]*\} | \b__[\w/-]+__\b            # {a|b} and __file__, wildcards
    | (?:^|\s)--(?:ar|aspect|chaos|niji|no|quality|s|seed|stylize|tile|v|version)\b  # Midjourney
    """,
    re.VERBOSE,
)
# One is in all of that. A search for them is fast, the more so without a set of characters.
SIGNS = re.compile(r"\(|\)|\{|<|:|\+|\[|_|BREAK|--")
SHOWN_NAMES = 10
KEPT_NAMES = 1000  # of columns, which JSON rows may have without end
COPIED = "copied columns"  # the only notice that changes no pixel


class Notices:
    """What the accepted rows of a manifest ask for that has another effect, or none.

    Args:
      prompt_column: the name of the prompt column, if the user has given it.
      guidance: how the model is guided, as in `family.Defaults`.
    """

    def __init__(self, prompt_column: str | None, guidance: str):
        self._prompt_column = prompt_column
        self._negative_is_ignored = guidance != CLASSIFIER_FREE
        self._scale_is_ignored = guidance == UNGUIDED
        self._names: tuple[str, ...] = ()  # of the columns of the last row with others than before
        self._copied: dict[str, str | None] = {}  # the setting that each looks like
        self._cut, self._foreign, self._ignored, self._scaled = (_Rows() for _ in range(4))
        self._most_lost = 0

    def add(self, place: tuple[str, int], names: Iterable[str], request: Request) -> None:
        """Counts one row.

        Args:
          place: its file and line.
          names: of its columns.
          request: shared by its images.
        """
        names = tuple(names)
        if names != self._names and len(self._copied) < KEPT_NAMES:
            self._names = names
            self._copied |= columns.copied(names, self._prompt_column)
        if has_foreign_syntax(request.prompt) or has_foreign_syntax(request.negative_prompt):
            self._foreign.add(place)
        unguided = self._negative_is_ignored or request.guidance_scale <= 1
        if request.negative_prompt and unguided:
            self._ignored.add(place)
        if self._scale_is_ignored and request.guidance_scale > 1:
            self._scaled.add(place)

    def add_cut(self, place: tuple[str, int], tokens_lost: int) -> None:
        """Counts a row whose prompts lose tokens."""
        self._cut.add(place)
        self._most_lost = max(self._most_lost, tokens_lost)

    def texts(self) -> dict[str, str]:
        """Returns a line for each kind of notice that applies, by the kind's name."""
        settings = {name: like for name, like in self._copied.items() if like}
        near = dict.fromkeys(like for like in settings.values() if like in columns.COLUMNS)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        effective = ", ".join(columns.COLUMNS)
        why = "the model takes none"
        if not self._negative_is_ignored:
            why = "guidance is off, at a guidance_scale of 1 or less"
        found = {
            COPIED: self._copied and f"{_shown(self._copied)} (to the images' metadata)",
            "columns like settings": settings
            and f"{_shown(settings)}: copied, without effect on images{hint} The columns with an "
            f"effect are {effective}",
            "cut prompts": self._cut.count
            and f"{self._cut}, up to {self._most_lost} tokens are lost at the end; shorten them, "
            "or use --prompt-chunks if the model has it",
            "syntax of other tools": self._foreign.count
            and f"{self._foreign}; it is encoded like all other text",
            "negative prompts without effect": self._ignored.count and f"{self._ignored}; {why}",
            "guidance scales without effect": self._scaled.count
            and f"{self._scaled}; the model was distilled to need none",
        }
        return {kind: text for kind, text in found.items() if text}


def has_foreign_syntax(prompt: str) -> bool:
    """Returns whether a prompt has what another tool would not encode as text."""
    return bool(SIGNS.search(prompt) and FOREIGN_SYNTAX.search(prompt))


class _Rows:
    """A number of rows, and where the first one is."""

    def __init__(self):
        self.count, self.first = 0, ("", 0)

    def add(self, place: tuple[str, int]) -> None:
        self.first = self.first if self.count else place
        self.count += 1

    def __str__(self) -> str:
        file, line = self.first
        rows = "1 row" if self.count == 1 else f"{self.count} rows, the first"
        return f"{rows} on line {line} of {file}"


def _shown(names: Collection[str]) -> str:
    """Returns the first names, each quoted, and how many more there are."""
    listed = ", ".join(map(checks.shown, itertools.islice(names, SHOWN_NAMES)))
    more = len(names) - SHOWN_NAMES
    return f"{listed} and {more} more" if more > 0 else listed
