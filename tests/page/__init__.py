"""Tests of the page's parts in a real browser, before a gateway that answers by a script."""
