"""What the edge benchmark does to a thresholded map: thin it, then match its pixels with labels one to one."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

Mask = NDArray[np.bool_]


def thin(mask: Mask) -> Mask:
    """Wear lines down to a width of one pixel without breaking them; an isolated 2 x 2 square vanishes.

    Args:
        mask: ``[H, W]``.

    Returns:
        The pixels that stay, ``[H, W]``.

    Source: Zhang and Suen, A Fast Parallel Algorithm for Thinning Digital Patterns, CACM 1984.

    >>> int(thin(np.ones((3, 9), dtype=bool)).sum(axis=0).max())
    1
    """
    mask = mask.copy()
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            ring = _neighbours(mask)
            north, east, south, west = ring[0], ring[2], ring[4], ring[6]
            count = ring.sum(axis=0)
            starts = (~ring & np.roll(ring, -1, axis=0)).sum(axis=0)
            if first:
                border = ~(north & east & south) & ~(east & south & west)
            else:
                border = ~(north & east & west) & ~(north & south & west)
            worn = mask & (count >= 2) & (count <= 6) & (starts == 1) & border
            mask &= ~worn
            changed |= bool(worn.any())
    return mask


def matched_pixels(predicted: Mask, labelled: Mask, radius: float) -> int:
    """How many predicted pixels can be paired with labelled ones at most ``radius`` apart, each used once.

    Args:
        predicted: ``[H, W]``.
        labelled: ``[H, W]``.
        radius: In pixels.

    Returns:
        The size of a maximum matching.

    >>> line = np.eye(5, dtype=bool)
    >>> matched_pixels(line, np.eye(5, k=1, dtype=bool), 1.0)
    4
    """
    reach = int(radius)
    number = np.cumsum(labelled).reshape(labelled.shape) - 1
    framed, numbers = np.pad(labelled, reach), np.pad(number, reach)
    rows, columns = np.nonzero(predicted)
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx <= radius * radius:
                y, x = rows + reach + dy, columns + reach + dx
                hit = np.flatnonzero(framed[y, x])
                pairs.append(np.stack([hit, numbers[y[hit], x[hit]]]))
    sources, targets = np.concatenate(pairs, axis=1)
    if not len(sources):
        return 0
    shape = (len(rows), int(labelled.sum()))
    graph = csr_matrix(coo_array((np.ones(len(sources), dtype=np.int8), (sources, targets)), shape=shape))
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def _neighbours(mask: Mask) -> Mask:
    """The eight neighbours of each pixel, clockwise from the one above, ``[8, H, W]``."""
    framed = np.pad(mask, 1)
    height, width = mask.shape
    ring = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    return np.stack([framed[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in ring])
