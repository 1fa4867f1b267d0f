"""Metric pages: the pages of several replicas as one, so that a scrape behind a proxy gets all of them."""

import re
from collections.abc import Iterable

_FAMILY = re.compile(rb"^(?=# HELP )", re.MULTILINE)


def merged(pages: Iterable[bytes]) -> bytes:
    """One page in Prometheus' text format: each family once, with the series of all pages, in their order.

    The series of two pages have to differ in a label, which `replica` sees to.
    """
    families: dict[bytes, list[bytes]] = {}
    for page in pages:
        for family in filter(None, _FAMILY.split(page)):
            about, kind, *series = family.splitlines(keepends=True)
            name = kind.split()[2]
            families.setdefault(name, [about, kind]).extend(series)
    return b"".join(line for lines in families.values() for line in lines)
