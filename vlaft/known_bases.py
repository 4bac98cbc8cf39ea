"""The released bases by their names on the Hub, and what is known of them without a download."""

from __future__ import annotations

from difflib import get_close_matches

# Licences as their pages on the Hub say; a download of the weights does not bring the page along.
LICENCES = {"openvla/openvla-7b": "mit", "openvla/openvla-v01-7b": "mit"}


def nearest_base(name: str) -> str:
    """Return `"; did you mean 'openvla/openvla-7b'?"` for a model's plain name, or an empty string.

    Only a name without an owner can be one: whoever writes a slash means a folder or knows the owner.

    >>> nearest_base("openvla-7b")
    "; did you mean 'openvla/openvla-7b'?"
    >>> nearest_base("data/openvla-7b")
    ''
    """
    if "/" in name:
        return ""
    known = {full.partition("/")[2]: full for full in LICENCES}
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean '{known[near[0]]}'?" if near else ""
