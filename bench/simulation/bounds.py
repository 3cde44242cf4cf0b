"""What no routing could exceed: the maximum flow through a placement, as a linear program for HiGHS.

The same as `peer.placement.carried`, by a solver that others wrote. scipy comes with the extra `bench`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from peer.placement import Placed


def lp_bound(placed: Sequence[Placed], layer_count: int) -> float:
    """The most tokens per second: each layer gets them from peers that hold it, none above its speed."""
    rows, columns, share = [], [], 0
    owners: list[int] = []
    for index, each in enumerate(placed):
        for layer in range(each.span.start, each.span.end):
            rows.append(layer)
            columns.append(share)
            owners.append(index)
            share += 1
    # The last unknown is the rate that every layer must have.
    needs = coo_matrix(
        (
            np.concatenate([np.ones(share), -np.ones(layer_count)]),
            ([*rows, *range(layer_count)], [*columns, *[share] * layer_count]),
        ),
        shape=(layer_count, share + 1),
    )
    spends = coo_matrix((np.ones(share), (owners, columns)), shape=(len(placed), share + 1))
    goal = np.zeros(share + 1)
    goal[-1] = -1.0
    found = linprog(
        goal,
        A_ub=spends.tocsr(),
        b_ub=[each.speed for each in placed],
        A_eq=needs.tocsr(),
        b_eq=np.zeros(layer_count),
        method="highs",
    )
    return float(-found.fun)
