"""Examples of critiques side by side, as one HTML page that loads nothing, runs nothing and escapes every text."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --good: #009e73; --bad: #d55e00 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 0 0 .4rem }
section { border-top: 1px solid var(--line); padding: 1.2rem 0 }
.asked { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .8rem }
.from { opacity: .7; font-size: .85rem; overflow-wrap: anywhere }
.seen { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 .8rem }
.seen img { max-width: 100%; border-radius: 4px; border: 1px solid var(--line) }
.sides { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
article { background: var(--soft); border-left: 4px solid var(--line); border-radius: 4px; padding: .7rem .9rem }
article.agrees { border-left-color: var(--good) } article.differs { border-left-color: var(--bad) }
dl { margin: .4rem 0 0 } dt { font-size: .8rem; opacity: .7; margin-top: .6rem }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
.head { display: flex; gap: 1rem; justify-content: space-between; font-variant-numeric: tabular-nums }
"""

_LEGEND = "Green: the reward agrees with people about all responses of another rank. Orange: it does not."


@dataclass(frozen=True, slots=True)
class Side:
    """One response and what was said of it."""

    response: str
    rank: int | None = None
    """By people, 1 for the best."""
    reward: float | None = None
    critique: str = ""
    """By the model."""
    reason: str = ""
    """By people."""


@dataclass(frozen=True, slots=True)
class Example:
    """One query with its responses."""

    id: str
    prompt: str
    sides: Sequence[Side]
    media: Sequence[str] = ()
    """Paths, which are named."""
    category: str = ""
    why: str = ""
    """Why it stands here."""
    pictures: Sequence[bytes] = ()
    """JPEG files, which are shown."""


def critiques_page(examples: Iterable[Example], title: str = "Critiques", told: str = "") -> str:
    """One page; a response is green where its reward stands right to those of all responses of another rank.

    `told` says how the examples were chosen.
    """
    sections = [_section(example) for example in examples]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>",
            f"<body><h1>{escape(title)}</h1>",
            f"<p>{len(sections):,} queries. {_LEGEND}{escape(told and ' ' + told)}</p>",
            *sections,
            "</body></html>",
            "",
        ]
    )


def _section(example: Example) -> str:
    order = sorted(example.sides, key=lambda side: (side.rank is None, side.rank or 0, side.response))
    articles = "".join(_article(side, _stands_right(side, example.sides)) for side in order)
    origin = " · ".join(filter(None, [example.id, example.category, ", ".join(example.media), example.why]))
    shown = "".join(f'<img alt="" src="data:image/jpeg;base64,{b64encode(one).decode()}">' for one in example.pictures)
    return (
        f'<section><h2 class="from">{escape(origin)}</h2>'
        + (f'<div class="seen">{shown}</div>' if shown else "")
        + f'<p class="asked" dir="auto">{escape(example.prompt)}</p><div class="sides">{articles}</div></section>'
    )


def _article(side: Side, right: bool | None) -> str:
    kind = "unknown" if right is None else "agrees" if right else "differs"
    told = "no rank" if side.rank is None else f"rank {side.rank}"
    reward = "no reward" if side.reward is None else f"reward {side.reward:+.3f}"
    parts = (("response", side.response), ("critique by the model", side.critique), ("reason by people", side.reason))
    said = "".join(
        f'<dt>{name}</dt><dd dir="auto">{escape(text) or "(empty)"}</dd>'
        for name, text in parts
        if text or name == "response"
    )
    return (
        f'<article class="{kind}"><div class="head"><b>{told}</b><span>{reward}</span></div><dl>{said}</dl></article>'
    )


def _stands_right(side: Side, sides: Sequence[Side]) -> bool | None:
    """Whether a better rank has a strictly larger reward, wherever both are known; None where they never are."""
    found = [
        (side.reward - other.reward) * (other.rank - side.rank) > 0
        for other in sides
        if side.rank is not None and other.rank is not None and side.rank != other.rank
        if side.reward is not None and other.reward is not None
    ]
    return all(found) if found else None
