"""Names of pages are equal exactly where texts are."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shared.client.page_names import PageNames
from shared.protocol import PREFIX_PAGE

KEY = bytes(range(32))
texts = st.lists(st.integers(0, 3), max_size=4 * PREFIX_PAGE)


@given(texts, texts, st.integers(0, 4 * PREFIX_PAGE))
def test_two_texts_share_the_names_of_the_whole_pages_that_they_share(
    one: list[int], other: list[int], shared: int
) -> None:
    other = one[:shared] + other
    alike = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    )
    names = PageNames(KEY)
    first, second = names.names(one), names.names(other)

    assert [len(first), len(second)] == [len(one) // PREFIX_PAGE, len(other) // PREFIX_PAGE]
    same = [a == b for a, b in zip(first, second, strict=False)]
    assert same == [True] * (alike // PREFIX_PAGE) + [False] * (len(same) - alike // PREFIX_PAGE)


def test_another_key_gives_other_names() -> None:
    text = list(range(200))
    mine, theirs = PageNames(KEY).names(text), PageNames(KEY[::-1]).names(text)
    assert not set(mine) & set(theirs)
    assert all(len(name) == 32 for name in mine)
