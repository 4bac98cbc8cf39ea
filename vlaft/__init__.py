"""Adapt OpenVLA models to a new robot from 10 to 150 demonstrations."""

__version__ = "0.1.0"
