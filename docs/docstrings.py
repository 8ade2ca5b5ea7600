"""Docstrings on their way into the documentation: reStructuredText's roles and directives become Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLES = (
    (r":math:`((?:[^`\\]|\\.)*)`", r"$\1$"),
    (r":(?:class|func|meth|attr|mod):`~?([^`]*)`", r"`\1`"),
    ("``", "`"),
)


def roles(text: str) -> str:
    """Roles and literals as Markdown."""
    for pattern, replacement in _ROLES:
        text = re.sub(pattern, replacement, text)
    return text


def _sections(text: str) -> str:
    """Displayed formulas, and the headings that Griffe knows; an example without a heading gets one."""
    text = re.sub(r"^\.\. math:: *(.*)$", r"$$\1$$", text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    before, prompt, example = text.partition("\n\n>>> ")
    if prompt:
        body = "\n".join(f"    {line}".rstrip() for line in f">>> {example}".splitlines())
        text = f"{before}\n\nExamples:\n{body}"
    return text


class Docstrings(griffe.Extension):
    """Rewrites every docstring that Griffe has collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """One module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _sections(roles(obj.docstring.value))
