"""Adapt OpenVLA models to a new robot from 10 to 150 demonstrations."""

import logging

__version__ = "0.1.0"

# peft imports bitsandbytes, which on some CPUs warns that an optional kernel package is absent. Nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
# Its products in 8 bits take float16; it says so at each one whose input is of another type.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: not record.getMessage().startswith("MatMul8bitLt: inputs will be cast")
)
