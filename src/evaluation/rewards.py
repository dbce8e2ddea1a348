"""Files of rewards joined to pairs by the texts of the answers, never by the order of rows.

Two layouts are read. That of the official evaluation: the row of the benchmark and `rewards: [chosen, rejected]`.
And ours, one row per response: `id`, `digest` (of the response's text) and `reward`. Of either, a reward that is no
finite number is an opinion that could not be read.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .. import jsonl, text
from ..fields import Fields
from ..fingerprint import ID_DIGITS, of_text
from ..ledger import Ledger
from .rewardbench import BenchError, Comparison, Rewards, name_of

_ROUNDING = 1e-4
"""By how much two rewards of one text may differ: it depends a little on what else was in the batch."""
_MARKS = re.compile(r"(~[0-9a-f]{1,12}|#[0-9]{1,2})+$")
"""What an importer puts behind the id of a question whose answers make several rankings."""


def read_rewards(path: Path, items: Sequence[Comparison], ledger: Ledger) -> dict[str, Rewards]:
    """The rewards of a file by the keys of the pairs; a pair without both is left out.

    Rows that are malformed, or about nothing that is asked, are counted in the ledger. Rewards that contradict each
    other are an error, for nothing says which one is meant.
    """
    if not path.is_file():
        raise ValueError(f"scores: expected a file of rewards, found none at {path}; check the path")
    joined = _Joined(path, items)
    for _ in jsonl.read(path, joined.take, ledger=ledger):
        pass
    if joined.pairs and joined.texts:
        raise ValueError(f"{path}: expected rows of one layout, got pairs and single responses; split the file")
    found = joined.of_pairs() if joined.pairs else joined.of_texts()
    if not found:
        raise ValueError(
            f"{path}: expected rewards of the {len(items):,} pairs, got none that joins ({ledger}); "
            "give the file that was made from these items"
        )
    return found


class _Joined:
    """What the rows of one file say of the items."""

    def __init__(self, path: Path, items: Sequence[Comparison]) -> None:
        self.path = path
        self.items = items
        self.pairs: dict[tuple[str, str, str], list[Rewards]] = defaultdict(list)
        self.texts: dict[str, dict[str, dict[str, float | None]]] = defaultdict(lambda: defaultdict(dict))
        """By the item's id, then the row's, then the text's digest."""
        self._asked = {(item.id, *item.digests) for item in items}
        self._known = {(item.id, digest) for item in items for digest in item.digests}
        self._ids = {item.id for item in items}

    def take(self, row: object) -> None:
        """Take one row in, or refuse it with a reason."""
        fields = Fields(row, "scores")
        name = name_of(fields)
        if "rewards" in fields:
            self._take_pair(name, fields)
        elif "digest" in fields:
            self._take_text(name, fields)
        else:
            raise BenchError(
                "expected `rewards` beside chosen and rejected, or `digest` and `reward`, got neither; "
                "write one of the two layouts",
                "unknown_layout",
            )

    def _take_pair(self, name: str, fields: Fields) -> None:
        chosen, rejected = (of_text(text.mend(fields.text(side)).text)[:ID_DIGITS] for side in ("chosen", "rejected"))
        if (name, chosen, rejected) not in self._asked:
            raise self._foreign(name)
        given = fields.optional("rewards")
        both = given if isinstance(given, list) and len(given) == 2 else (None, None)
        self.pairs[name, chosen, rejected].append(Rewards(*map(number_of, both)))

    def _take_text(self, name: str, fields: Fields) -> None:
        digest, reward = digest_of(fields), reward_of(fields)
        asked = name if name in self._ids else _MARKS.sub("", name)
        if (asked, digest) not in self._known:
            raise self._foreign(asked)
        if not same_reward(self.texts[asked][name].setdefault(digest, reward), reward):
            raise self._contradiction(name, "one reward for one text", "two that differ")

    def _foreign(self, name: str) -> BenchError:
        if name in self._ids:
            return BenchError(f"id {name!r}: expected texts of this question, got others; score these", "other_text")
        return BenchError(f"id {name!r}: expected a question of the benchmark, got another", "foreign_id")

    def _contradiction(self, name: str, expected: str, got: str) -> jsonl.JsonError:
        return jsonl.JsonError(f"id {name!r}: expected {expected}, got {got}; remove one", "conflicting_key")

    def of_pairs(self) -> dict[str, Rewards]:
        """By key; rows that repeat a pair are shared out among the items that do."""
        members: dict[tuple[str, str, str], list[Comparison]] = defaultdict(list)
        for item in self.items:
            members[item.id, *item.digests].append(item)
        found: dict[str, Rewards] = {}
        for key, rewards in self.pairs.items():
            # Which copy gets which does not matter: copies are of one id and one category.
            told = sorted(rewards, key=lambda pair: [(value is None, value or 0.0) for value in pair])
            if len(set(told)) == 1:
                told = told[:1] * len(members[key])
            if len(told) != len(members[key]):
                got = f"{len(told)} that differ"
                expected = f"as many rewards for a pair as it has rows ({len(members[key])})"
                raise ValueError(f"{self.path}: {self._contradiction(key[0], expected, got)}")
            found |= {item.key: pair for item, pair in zip(members[key], told, strict=True)}
        return found

    def of_texts(self) -> dict[str, Rewards]:
        """By key; both texts must have been scored under one name, for so they were seen as rivals."""
        found = {}
        for item in self.items:
            chosen, rejected = item.digests
            rankings = [of for _, of in sorted(self.texts[item.id].items()) if chosen in of and rejected in of]
            rewards = [Rewards(of[chosen], of[rejected]) for of in rankings]
            if len({_verdict(pair) for pair in rewards}) > 1:
                error = self._contradiction(item.id, "rankings of this question to agree", "two that do not")
                raise ValueError(f"{self.path}: {error}")
            if rewards:
                found[item.key] = rewards[0]
        return found


def digest_of(fields: Fields) -> str:
    """What the text of a response is known by, in a row of ours."""
    digest = fields.text("digest")[:ID_DIGITS]
    if len(digest) < ID_DIGITS:
        raise BenchError(f"digest: expected {ID_DIGITS} digits or more, got {digest!r}", "short_digest")
    return digest


def reward_of(fields: Fields) -> float | None:
    """The reward of a row of ours; None is one that could not be read, and a row without the field is refused."""
    if "reward" not in fields:
        raise BenchError("reward: expected a number or null, the field is missing; score with a reward", "no_reward")
    return number_of(fields.optional("reward"))


def number_of(value: object) -> float | None:
    """A finite number, or None for anything else, of which true and false are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -sys.float_info.max <= value <= sys.float_info.max else None


def _verdict(rewards: Rewards) -> float | None:
    if rewards.chosen is None or rewards.rejected is None:
        return None
    return (rewards.chosen > rewards.rejected) - (rewards.chosen < rewards.rejected)


def same_reward(one: float | None, other: float | None) -> bool:
    """Whether two rewards of one text are the same but for rounding."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
