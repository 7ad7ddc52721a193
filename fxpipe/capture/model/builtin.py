"""Which modules are torch's own: what they do is known, and nothing would be learnt by looking inside.

Asked of the file that defines the class, at three places: a loss module of torch's is not opened to see how it weighs
samples (what it calls is seen), its scalar is no activation that a model hands out, and a module of torch's without
parameters (an activation, a dropout) is not tried as something that hangs on no activation.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
from torch import nn

_HOME = os.path.dirname(torch.nn.__file__)


def is_builtin(module: nn.Module) -> bool:
    """Tell whether a module's class comes with torch.

    >>> is_builtin(nn.MSELoss()), is_builtin(type("Mine", (nn.MSELoss,), {})())
    (True, False)
    """
    kind: Any = type(module)  # mypy takes no class for hashable
    return _is_defined_there(kind)


@functools.lru_cache(maxsize=4096)
def _is_defined_there(kind: Any) -> bool:
    home = sys.modules.get(getattr(kind, "__module__", ""))
    return os.path.dirname(getattr(home, "__file__", None) or "").startswith(_HOME)
