"""Remember which routes hold the beginning of which texts, so that a chat's next question goes there again.

Each hop of a route keeps what a finished session computed; behind other hops it is of no use. So a route is
worth taking again as a whole, even if another is somewhat faster for each token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from shared.protocol import PREFIX_PAGE, RouteSpan

MOST = 16_384
"""Pages that are remembered: a million positions. More forget the one used least recently, whose text is then
planned as if it were new."""

POSITION_SHARE = 0.05
"""What a position of a prompt takes, of a token drawn alone: measured, a prompt goes 20 times as fast."""


class PrefixRoutes:
    """The last route of each text, found by the names of its pages."""

    def __init__(self) -> None:
        self._routes: OrderedDict[str, tuple[RouteSpan, ...]] = OrderedDict()

    def remember(self, pages: Sequence[str], route: Sequence[RouteSpan]) -> None:
        """A session that ended well has left these pages on each hop of this route."""
        for page in pages:
            self._routes[page] = tuple(route)
            self._routes.move_to_end(page)
        while len(self._routes) > MOST:
            self._routes.popitem(last=False)

    def find(self, pages: Sequence[str]) -> tuple[Sequence[RouteSpan], int]:
        """The route that holds most of a text's beginning, and how many positions; an empty one if none."""
        for count in range(len(pages), 0, -1):
            if route := self._routes.get(pages[count - 1]):
                return route, count * PREFIX_PAGE
        return (), 0


def worth_it(again_ms: float, fresh_ms: float, positions: int, new_tokens: int) -> bool:
    """Whether a route that holds so many positions is the faster one for the whole answer.

    `again_ms` and `fresh_ms` are what a token takes on it and on the best route that holds nothing.
    """
    return (again_ms - fresh_ms) * new_tokens <= positions * POSITION_SHARE * again_ms
