"""Accept and Accept-Encoding: how much a client wants each of several representations."""

from __future__ import annotations


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether an Accept-Encoding header (RFC 9110, 12.5.3) allows a gzip response."""
    if not accept_encoding:
        return False
    weights = read_weights(accept_encoding)
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def read_weights(header: str) -> dict[str, float]:
    """Return the names in an Accept or Accept-Encoding header with their weights (RFC 9110, 12.4.2).

    Names are lower-case; a name without a weight has the weight 1, one with an invalid weight 0.
    """
    weights: dict[str, float] = {}
    for choice in header.lower().split(","):
        name, *parameters = (text.strip() for text in choice.split(";"))
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0.0
    return weights
