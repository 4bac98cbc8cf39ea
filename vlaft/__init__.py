"""Adapt OpenVLA models to a new robot from 10 to 150 demonstrations.

    import vlaft

    policy = vlaft.load("model/")
    policy.predict(image, "pick up the red block").action

`load` is fetched when it is asked for, so that `import vlaft` needs no torch. transformers' Auto classes know OpenVLA
from here on, and are not imported for that either (`vlaft.model.registration`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vlaft.model.registration import register_with_transformers
from vlaft.version import __version__ as __version__

if TYPE_CHECKING:
    from vlaft.policy import load

__all__ = ["load"]

# peft imports bitsandbytes, which on some CPUs warns that an optional kernel package is absent. Nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
# Its products in 8 bits take float16; it says so at each one whose input is of another type.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: not record.getMessage().startswith("MatMul8bitLt: inputs will be cast")
)

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlaft import policy as inference

    return getattr(inference, name)
