"""The version, in a module that imports nothing, so that all others may import it; the build reads it here as well."""

__version__ = "0.1.0"
