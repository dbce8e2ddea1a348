"""Files of scores joined to the responses that they are about; a score of another text is a foreign score.

A file holds JSON lines with at least `id`, `response` (its place in the query, from 0) and `reward` or
`reference_logp`. `mmrlhf score` writes the `digest` of the response's text with each. A file of another tool may leave
it out beside a reward, and may have further columns, which are not read. Several files, and several rows about one
response, add up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from .. import jsonl
from ..fields import RecordError
from ..fingerprint import ID_DIGITS, Fingerprint, of_text
from ..records import ResponseScore
from .indexing import ranked_of
from .shards import REQUIRED

if TYPE_CHECKING:
    from ..records import RankedQuery
    from .reader import Sample, Shards
    from .rows import Row

log = logging.getLogger(__name__)
Scale = Literal["reward", "reference_logp"]
NOTHING = math.nan
VALUES, MODEL = "values", "model"
"""Parts of a file's fingerprint: what it holds, and by which model."""
DATA = "data."
"""Before the name of a split: the part that stands for its samples."""
_OF_LOGPS = ("processor", "template", "frames")
_SCALES = ("reward", "reference_logp")
_COLUMNS = ("id", "response", "digest", *_SCALES)
_CURE = "run `mmrlhf score` on the same shards"


class Scored(NamedTuple):
    """What is known of one response."""

    digest: str
    """As many digits of its text's digest as make an id; empty where nobody told."""
    reward: float
    reference_logp: float


class Scores:
    """All scores of some files by query and place.

    The files are read when a score is first asked for: who finds it decided which samples are used needs none of it.
    """

    def __init__(self, paths: Sequence[Path], needs: tuple[Scale, ...]) -> None:
        for path in paths:
            _require_file(path)
        self.paths, self.needs = tuple(paths), needs

    @cached_property
    def _known(self) -> dict[tuple[str, int], Scored]:
        known: dict[tuple[str, int], Scored] = {}
        for path in self.paths:
            for score in jsonl.read(path, _read):
                place = score.id, score.response
                known[place] = _joined(path, score, known.get(place, Scored("", NOTHING, NOTHING)))
        return known

    def of(self, ranked: RankedQuery) -> list[Scored] | None:
        """The scores of a query's responses, in their order; None where one lacks what is needed."""
        scored = []
        for place, response in enumerate(ranked.responses):
            expected = of_text(response.text)[:ID_DIGITS]
            score = self._known.get((ranked.query.id, place), Scored("", NOTHING, NOTHING))
            if score.digest not in ("", expected):
                raise ValueError(
                    f"{self._named}: the score of response {place} of query {ranked.query.id!r} is about another "
                    f"text; {_CURE}"
                )
            scored.append(score)
        return None if any(map(self._lacks, scored)) else scored

    def missing(self, ids: list[str], samples: int) -> ValueError:
        """The error for queries without scores."""
        wanted = " and ".join(self.needs)
        return ValueError(
            f"{self._named}: no {wanted} for {len(ids):,} of {samples:,} queries (first: {ids[0]!r}); {_CURE}"
        )

    @property
    def _named(self) -> str:
        return " and ".join(map(str, self.paths))

    def _lacks(self, score: Scored) -> bool:
        return any(math.isnan(getattr(score, name)) for name in self.needs)


def _read(row: object) -> ResponseScore:
    """A row of any tool; where a text is not named, only a reward is believed to be about it."""
    if not isinstance(row, Mapping):
        raise RecordError(f"score: expected a JSON object, got {row!r:.60}")
    known = {name: row[name] for name in _COLUMNS if name in row}
    if row.get("reference_logp") is None:
        known.setdefault("digest", "")
    return ResponseScore.from_json(known)


def _joined(path: Path, score: ResponseScore, before: Scored) -> Scored:
    """What a row adds to what earlier rows told of the same response."""
    digest = score.digest[:ID_DIGITS]
    told = {name: float(value) for name in _SCALES if (value := getattr(score, name)) is not None}
    known = {name: getattr(before, name) for name in told if not math.isnan(getattr(before, name))}
    other_text = "" not in (before.digest, digest) and before.digest != digest
    if other_text or known != {name: told[name] for name in known}:
        raise ValueError(
            f"{path}: expected one score of response {score.response} of query {score.id!r}, got two that differ; "
            "remove one, or make them again from the same shards"
        )
    return before._replace(digest=before.digest or digest, **told)


def require_scores(shards: Shards, scores: Scores, encode: Callable[[Sample], Row], samples: Sequence[int]) -> None:
    """Refuse missing scores in seconds; what cannot be encoded has none, and is left out for that reason."""
    missing = []
    for index in samples:
        try:
            ranked = ranked_of(jsonl.loads(shards.parts(index)[REQUIRED]))
        except (ValueError, KeyError):
            continue  # a damaged sample, which is left out with its reason when it is judged
        if scores.of(ranked) is None:
            missing.append((ranked.query.id, index))
    if any(_can_be_encoded(shards, index, encode) for _, index in missing):  # the first that can be ends the search
        raise scores.missing([name for name, _ in missing], len(samples))


def _can_be_encoded(shards: Shards, index: int, encode: Callable[[Sample], Row]) -> bool:
    try:
        encode(shards[index])
    except ValueError:
        return False
    return True


def fingerprints(paths: Sequence[Path]) -> dict[Path, Fingerprint]:
    """What files of scores were made from, for those that tell; the others are taken as they are."""
    found = {}
    for path in paths:
        _require_file(path)
        if path.with_name(f"{path.name}.fingerprint.json").exists():
            found[path] = Fingerprint.read(path)
        else:
            log.info("%s: no fingerprint beside it; its scores are joined by id, place and text alone", path)
    return found


def require_made_from(found: Mapping[Path, Fingerprint], parts: Mapping[str, str]) -> None:
    """Refuse a file of other data; and log-probs of a reference that read the queries in another way.

    What a file tells of a split that is not asked about is its own affair, for several files may share the splits.
    """
    for path, fingerprint in found.items():
        told = fingerprint.parts
        compared = [name for name in parts if name.startswith(DATA) and name in told]
        if told.get(VALUES) == "reference_logp":
            compared += _OF_LOGPS
        if compared:
            expected = Fingerprint({name: parts[name] for name in compared})
            cure = "run `mmrlhf score` with the same shards, processor and frames, or give the file that belongs here"
            expected.require(Fingerprint({name: told.get(name, "none") for name in compared}), str(path), cure)


def reference_of(found: Mapping[Path, Fingerprint], part: str = MODEL) -> str | None:
    """What stands for the model whose log-probs are in the files, or another part; None where no file tells."""
    models = {one.parts[part] for one in found.values() if one.parts.get(VALUES) == "reference_logp"}
    if len(models) > 1:
        named = " and ".join(map(str, found))
        raise ValueError(f"scores: expected log-probs of one reference, got those of {len(models)} in {named}; use one")
    return next(iter(models), None)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"scores: expected a file, found none at {path}; {_CURE}")
