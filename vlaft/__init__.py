"""Adapt OpenVLA models to a new robot from 10 to 150 demonstrations."""

import logging

__version__ = "0.1.0"

# peft imports bitsandbytes, which on some CPUs warns that an optional kernel package is absent. Nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
