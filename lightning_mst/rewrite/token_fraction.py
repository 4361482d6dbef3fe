"""Of how many tokens to move more to the host, rather than to recompute it."""

from __future__ import annotations


def largest_token_fraction(
    *,
    always_bytes: int,
    all_tokens_bytes: int,
    bytes_per_second: float,
    layer_seconds: float,
    num_layers: int,
    host_bytes: int,
) -> float:
    """The largest fraction of the tokens whose other activations can be moved for nothing.

    A layer's copies should be done before the next layer's begin, and what all layers keep should fit into the host's
    memory. Both bounds are linear in the fraction, so the smaller one decides.

    Args:
        always_bytes: what each layer moves in any case.
        all_tokens_bytes: what it would move besides for all tokens.
        bytes_per_second: of the copies.
        layer_seconds: of a layer's forward pass, the shorter one.
        num_layers: how many layers move.
        host_bytes: what the host has for all of them.

    Returns:
        From 0 to 1; 0 also where not even ``always_bytes`` hides or fits.

    Raises:
        ValueError: for a negative number, or no layers.

    Source: arXiv 2407.12117 (MEMO), section 4.1.
    """
    amounts = (always_bytes, all_tokens_bytes, bytes_per_second, layer_seconds, host_bytes)
    if min(amounts) < 0 or num_layers < 1:
        raise ValueError(
            f"Bytes, bytes per second and seconds can't be negative, and there must be a layer; got {amounts} and "
            f"num_layers={num_layers}."
        )
    spare_bytes = min(bytes_per_second * layer_seconds, host_bytes / num_layers) - always_bytes
    if spare_bytes < 0:
        return 0.0
    return 1.0 if spare_bytes >= all_tokens_bytes else spare_bytes / all_tokens_bytes
