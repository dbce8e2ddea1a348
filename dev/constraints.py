"""Print `name==version` for everything that `mmrlhf[dev]` stands on in the environment that runs this.

`make constraints` runs it in a fresh virtual environment. Markers are evaluated here, so that what only
another platform needs is missing: constraints restrict what is installed, they install nothing.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def closure(root: str, requires: Callable[[str], Iterable[str] | None]) -> set[str]:
    """The canonical names of all that `root` requires, directly or not; `requires` says what a name requires.

    >>> graph = {"a": ["b[fast]", "c; python_version < '3'"], "b": ["d; extra == 'fast'", "e; extra == 'x'"]}
    >>> sorted(closure("a", graph.get))
    ['b', 'd']
    """
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root)]
    while waiting:
        wanted = waiting.pop()
        for extra in ["", *wanted.extras]:
            key = (canonicalize_name(wanted.name), extra)
            if key in seen:
                continue
            seen.add(key)
            needs = [Requirement(line) for line in requires(key[0]) or []]
            waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen} - {canonicalize_name(Requirement(root).name)}


def pin(name: str) -> str:
    """The line of one distribution; one that came from a local build is refused."""
    found = metadata.distribution(name)
    if "+" in found.version or found.read_text("direct_url.json"):
        raise SystemExit(f"{name} {found.version} was built locally; run `make constraints`, which starts afresh")
    return f"{found.name}=={found.version}"


if __name__ == "__main__":
    print("\n".join(pin(name) for name in sorted(closure("mmrlhf[dev]", metadata.requires))))
