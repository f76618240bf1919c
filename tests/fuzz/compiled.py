"""The entries of the fuzz that run compiled kernels: what is called under sanitizers."""

from __future__ import annotations

from tests.fuzz.functions import FUNCTIONS
from tests.fuzz.operators import OPERATORS

_FORMS = ("modulated_deform_conv2d", "pyramid_block", "unified")
ENTRIES = {**{name: FUNCTIONS[name] for name in _FORMS}, **OPERATORS}
