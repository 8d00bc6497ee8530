"""Which of a GPU's layouts a packed matrix is arranged in; no torch here, so that the command line can ask too."""

from macko_llm.defaults import LAYOUT, LAYOUTS

TILED_CAPABILITY = (8, 0)
"""The least capability of a GPU that multiplies tiles."""

_TILED_FROM = ((0.8, 3), (1.0, 6))
"""(up to this sparsity, tiled from this many tokens), the sparsities rising up to 1; measured on an H200 (docs/design.md)."""


def check(layout: str) -> None:
    """Raise ValueError unless a layout is one of `defaults.LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it can be {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}")


def choose(layout: str, sparsity: float, tokens: int, capability: tuple[int, int]) -> str:
    """The layout to arrange a matrix in, where it suits.

    Args:
        layout: what is asked for, one of `defaults.LAYOUTS`.
        sparsity: of the matrix, 0 to 1.
        tokens: that are multiplied at a time, as far as that is known.
        capability: of the GPU.

    Returns:
        "sliced" or "tiled".

    Raises:
        ValueError: there is no such layout.
    """
    check(layout)
    if capability < TILED_CAPABILITY:
        return "sliced"
    if layout != LAYOUT:
        return layout
    at_least = next(least for most_sparse, least in _TILED_FROM if sparsity <= most_sparse)
    return "tiled" if tokens >= at_least else "sliced"
