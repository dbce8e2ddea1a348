"""The account of a stage: whatever came in went out or was skipped for a reason, and the sum is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_FIRST = 3  # item names kept per reason: enough to look one up, however many are skipped
_FIELDS = {"stage": str, "in": int, "out": int, "skipped": dict, "first": dict, "fixed": dict}


class LedgerError(AssertionError):
    """An account that does not balance, which only a bug can bring about; `python -O` does not silence it."""


@dataclass
class Ledger:
    """The account of one stage, in = out + skipped (by reason); every worker keeps its own, to be merged.

    >>> ledger = Ledger("import")
    >>> ledger.took(3)
    >>> ledger.gave(2)
    >>> ledger.skip("not_utf8", "raw.jsonl:2")
    >>> ledger.fixed("bom")
    >>> print(ledger)
    import: 3 in = 2 out + 1 skipped (not_utf8 1); fixed bom 1
    """

    stage: str
    taken: int = 0
    given: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)

    def took(self, n: int = 1) -> None:
        """Count items that came in."""
        self.taken += _count("took", n)

    def gave(self, n: int = 1) -> None:
        """Count items that went out."""
        self.given += _count("gave", n)

    def skip(self, reason: str, item: str = "") -> None:
        """Count one item left out, under a reason code, and remember its name if it is one of the first."""
        self._add_skipped(reason, 1, [item] if item else [])

    def fixed(self, kind: str, n: int = 1) -> None:
        """Count repairs, which leave the balance alone because a repaired item still goes out."""
        self.repaired[kind] = self.repaired.get(kind, 0) + _count("fixed", n)

    def merge(self, other: Ledger) -> None:
        """Add the account that another worker kept of the same stage."""
        if other.stage != self.stage:
            raise ValueError(
                f"{self.stage}: expected another account of this stage, got one of {other.stage}; "
                "merge the accounts of each stage apart"
            )
        self.took(other.taken)
        self.gave(other.given)
        for reason, n in other.skipped.items():
            self._add_skipped(reason, n, other.first.get(reason, []))
        for kind, n in other.repaired.items():
            self.fixed(kind, n)

    def check(self, max_skipped: float | None = None) -> None:
        """Raise if an item is unaccounted for, or if more than the fraction `max_skipped` was skipped."""
        if max_skipped is not None and not 0 <= max_skipped <= 1:
            raise ValueError(f"max_skipped: expected 0 to 1, got {max_skipped}; 0.01 means one in a hundred")
        skipped = sum(self.skipped.values())
        if self.taken != self.given + skipped:
            raise LedgerError(f"{self}; this is a bug of the stage, not a fault of its input")
        if max_skipped is not None and skipped > max_skipped * self.taken:
            raise ValueError(
                f"{self.stage}: expected at most {max_skipped:.2%} skipped, got {skipped / self.taken:.2%} "
                f"({skipped:,} of {self.taken:,}): {self._reasons()}; repair these items or raise max_skipped"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the account as plain JSON that shares nothing with it."""
        first = {reason: list(items) for reason, items in self.first.items()}
        values = (self.stage, self.taken, self.given, dict(self.skipped), first, dict(self.repaired))
        return dict(zip(_FIELDS, values, strict=True))

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Ledger:
        """Rebuild the account that `as_dict` described."""
        sound = all(isinstance(row.get(name), kind) for name, kind in _FIELDS.items())
        if not sound or len(row) > len(_FIELDS):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in _FIELDS.items())
            raise ValueError(f"ledger: expected {expected}, got {dict(row)!r:.200}; write it with as_dict")
        ledger = cls(row["stage"])
        ledger.took(row["in"])
        ledger.gave(row["out"])
        for reason, n in row["skipped"].items():
            ledger._add_skipped(reason, n, row["first"].get(reason, []))
        for kind, n in row["fixed"].items():
            ledger.fixed(kind, n)
        return ledger

    def __str__(self) -> str:
        skipped = sum(self.skipped.values())
        sign = "=" if self.taken == self.given + skipped else "!="
        line = f"{self.stage}: {self.taken:,} in {sign} {self.given:,} out + {skipped:,} skipped"
        if self.skipped:
            line += f" ({_ranked(self.skipped)})"
        return f"{line}; fixed {_ranked(self.repaired)}" if self.repaired else line

    def _add_skipped(self, reason: str, n: int, items: list[str]) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + _count(f"skipped {reason}", n)
        if items:
            self.first[reason] = [*self.first.get(reason, []), *items][:_FIRST]

    def _reasons(self) -> str:
        """Name the reasons, the most frequent first, each with its first items."""
        return "; ".join(
            f"{reason} {n:,}" + (f" (first: {', '.join(self.first[reason])})" if reason in self.first else "")
            for reason, n in _by_count(self.skipped)
        )


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _ranked(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in _by_count(counts))


def _count(what: str, n: int) -> int:
    # A negative count could hide a lost item behind an equal and opposite mistake.
    if type(n) is not int or n < 0:
        raise ValueError(f"{what}: expected a count of 0 or more, got {n!r}; count items, never take any back")
    return n
