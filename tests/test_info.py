"""The facts that ``python -m dyhead_cuda info`` tells."""

from __future__ import annotations

import json

import torch

from dyhead_cuda import info, library
from dyhead_cuda.version import __version__


def test_the_facts_are_those_of_this_machine() -> None:
    facts = json.loads(json.dumps(info.gather()))
    assert facts["versions"]["dyhead_cuda"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert set(facts["libraries"]) == set(library.NAMES)
    assert len(facts["gpus"]) == torch.cuda.device_count()
