"""The package's docstrings for the site: their sections and roles in the words of Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([^`]+)`")


class Docstrings(Extension):
    """Makes sections of examples out of ``Example:``, and code out of roles as ``:func:`name```."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = ROLE.sub(r"`\1`", text)
