"""A few ranked queries of every kind, and batches of them as training has them."""

from __future__ import annotations

import torch

from mmrlhf.datamodules.collate import ScoredRow, collate
from mmrlhf.datamodules.rows import Answers
from mmrlhf.queries import Turn

from ..datamodules.made import picture, sample

FRAMES = 4
KINDS = ("text", "image", "images", "film")
LONG = "I think that there is a green ring on the left and a blue circle on the right, and that neither moves."
FILM = [picture(seed) for seed in range(10, 10 + FRAMES)]


def samples(kinds=KINDS):
    """Queries with such media: two to five responses, of no word, of one and of many, some of equal rank."""
    made = {
        "text": [
            sample("text", texts=("It is red.", "Blue", LONG), ranks=(2, 1, 2)),
            sample(
                "talk",
                texts=("No", "Yes, it is."),
                system="You are a helpful assistant.",
                history=(Turn("user", "Hello!"), Turn("assistant", "Hi there.")),
            ),
        ],
        "image": [
            sample("image", [[picture(1)]], texts=("A ring", "", "a red square", LONG), ranks=(1, 4, 2, 2)),
            sample(
                "square", [[picture(2, (40, 40))]], offsets=[9], prompt="Look here and tell me.", texts=(LONG, "no")
            ),
        ],
        "images": [
            sample(
                "images",
                [[picture(3, (80, 30))], [picture(4, (30, 70))]],
                offsets=[0, 8],
                prompt="Compare both of them.",
                texts=("The left", "the right one is green", "both", "Neither of them, I think.", "one"),
                ranks=(1, 1, 2, 3, 3),
            )
        ],
        "film": [
            sample("film", [FILM], prompt="Does it move?", texts=("up", LONG, "it rests", "left, then down")),
        ],
    }
    return [case for kind in kinds for case in made[kind]]


def batch(processor, samples, layout="packed"):
    """The queries as a batch; rewards and log-probs of the reference are not known."""
    rows = [Answers(processor, FRAMES)(case) for case in samples]
    unknown = [torch.full((len(row.places),), torch.nan) for row in rows]
    scored = [ScoredRow(row, nothing, nothing, counted=True) for row, nothing in zip(rows, unknown, strict=True)]
    return collate(scored, padding=processor.tokenizer.pad_token_id, layout=layout, pairs="all")
