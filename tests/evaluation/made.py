"""A benchmark with the paper's numbers of pairs and ids, and rewards of known outcome."""

from __future__ import annotations

from pathlib import Path

from mmrlhf import jsonl
from mmrlhf.fingerprint import of_text
from mmrlhf.queries import Query
from mmrlhf.records import RankedQuery, Response

PAIRS_OF_IDS = {
    "mcq": [6, 5, 5, 5, 5, 4, 4, 3, 3, 2],
    "long": [6, 5, 5, 4, 4, 3, 3, 3, 2, 2],
    "short": [5, 5, 4, 3, 3, 3, 3, 3, 3, 2],
    "safety": [6, 6, 6, 5, 5, 4],
    "video": [3, 3, 3, 3, 3, 2, 2, 2, 2, 2],
}
"""42, 37, 34, 32 and 25 pairs."""
CRITIC = {"mcq": (39, 7), "long": (37, 10), "short": (24, 5), "safety": (21, 1), "video": (23, 8)}
"""Right pairs and ids of MM-RLHF-Reward-7B, by its cells of Table 4: together 144 and 31."""


def bench_row(identity: str, path: str, number: int = 0, **more) -> dict:
    kind = "video" if path.startswith("video") else "image"
    row = {
        "id": identity,
        kind: path,
        "prompt": f"What is in {identity}?",
        "chosen": f"good {number} of {identity}",
        "rejected": f"bad {number} of {identity}",
        "chosen_reason": "right",
        "rejected_reason": "wrong",
    }
    return row | more


def papers_rows() -> list[dict]:
    return [
        bench_row(f"{category}_{place}", f"{category}/{place}.png", number)
        for category, sizes in PAIRS_OF_IDS.items()
        for place, size in enumerate(sizes)
        for number in range(size)
    ]


def outcomes(right_of: dict[str, tuple[int, int]]) -> list[bool]:
    """Which rows are right so that the counts come out: the last ids of a category have the errors, in turn."""
    found = []
    for category, sizes in PAIRS_OF_IDS.items():
        right, right_ids = right_of[category]
        wrong = [0] * len(sizes)
        left = sum(sizes) - right
        while left:
            for place in range(right_ids, len(sizes)):
                if left and wrong[place] < sizes[place]:
                    wrong[place] += 1
                    left -= 1
        found += [number >= wrong[place] for place, size in enumerate(sizes) for number in range(size)]
    return found


def rewarded(rows: list[dict], right: list[bool]) -> list[dict]:
    """In the layout of the official evaluation."""
    return [
        row | {"rewards": [0.5 + number / 7, 0.5 + number / 7 + (-0.25 if good else 0.25)], "critic": ["a", "b"]}
        for number, (row, good) in enumerate(zip(rows, right, strict=True))
    ]


def scored(rewarded_rows: list[dict]) -> list[dict]:
    """The same as a row per response, in the layout of `mmrlhf score`."""
    found = []
    for row in rewarded_rows:
        for place, (side, reward) in enumerate(zip(("chosen", "rejected"), row["rewards"], strict=True)):
            found.append({"id": row["id"], "response": place, "digest": of_text(row[side]), "reward": reward})
    return found


def written(path: Path, rows: list) -> Path:
    jsonl.write(path, rows)
    return path


def ranked_query(name: str, ranks: list[int], category: str | None = "short", **more) -> RankedQuery:
    """A query whose answers all differ, the n-th with n letters more than the first."""
    said = (Response(f"{name} {'x' * place}", rank=rank, reason=f"why {place}") for place, rank in enumerate(ranks))
    return RankedQuery(Query(name, f"What is in {name}?", category=category, **more), tuple(said))


def scores_of(records: list[RankedQuery], rewards: list[list[float]], **columns: list[list[object]]) -> list[dict]:
    """A row per response in the layout of `mmrlhf score`, with further columns."""
    return [
        {"id": record.query.id, "response": place, "digest": of_text(response.text), "reward": rewards[number][place]}
        | {name: values[number][place] for name, values in columns.items()}
        for number, record in enumerate(records)
        for place, response in enumerate(record.responses)
    ]
