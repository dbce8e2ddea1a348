"""The verb `judge`: a model that speaks, here or behind an address, gives its opinion of a benchmark's answers.

A door: the benchmark says what is asked and what the words mean, a model answers. Every answer is kept as soon as it
is there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from . import jsonl
from .checkpoints import resolved
from .containers import MediaError
from .datamodules.scoring import is_there
from .encoding import Message
from .endpoint import CUT, Endpoint, Reply
from .evaluation.rewardbench import Comparison, RewardBench
from .evaluation.verdicts import Question, Verdicts, Way, questions
from .fields import at_least
from .fingerprint import Fingerprint, of_file, of_value
from .ledger import Ledger
from .media import digest, load
from .modules.answering import Answerer
from .modules.loading import Number
from .progress import bar, track
from .prompts import load_template
from .provenance import model_digest, processor_digest
from .queries import Media
from .settings import alone, claim

log = logging.getLogger(__name__)
_MARKER, _JOURNAL = "judge.json", "journal.jsonl"


def judge(
    items: Path,
    media: Path,
    out: Path,
    model: str | None = None,
    endpoint: Endpoint | None = None,
    way: Way = "pairwise",
    template: Path | None = None,
    frames: int = 8,
    max_new_tokens: int = 512,
    at_once: int = 8,
    dtype: Number = "float32",
    device: str = "auto",
    max_skipped: float = 0.0,
) -> None:
    """Ask a model that speaks which answers of a benchmark it finds better, or how good it finds each.

    The file is one of rewards, as `mmrlhf evaluate rewardbench --scores` reads it. Of a pair the model is asked in both
    orders: a verdict that depends on the order is a tie, and one that cannot be read is missing. Run again, it
    continues where it was stopped; a finished file is left as it is.

    Args:
        items: The benchmark, mm_reward_bench.jsonl or a file of the same layout.
        media: Folder of its pictures and films.
        out: File of verdicts, JSON lines; beside it is written what it was made from.
        model: A checkpoint that judges on this machine: folder, or name on the hub.
        endpoint: A served model instead, which speaks the protocol of chat completions.
        way: Pairwise, which is better; or pointwise, a score of 1 to 10 for each answer by itself.
        template: Text file with the request; default: our own for the way.
        frames: Frames of a film.
        max_new_tokens: After so many tokens an answer is cut, and then no opinion.
        at_once: At most so many answers of a checkpoint are written together; of an endpoint see endpoint.at_once.
        dtype: The type of a checkpoint's weights.
        device: Where a checkpoint computes: auto, cpu, cuda or cuda:N.
        max_skipped: The part of the rows that may be left out, malformed or without sound media; each is counted.
    """
    _require(model, endpoint, frames, max_new_tokens, at_once)
    request = load_template(template or f"judge_{way}")
    pairs = _pairs(items, max_skipped)
    told = {"items": of_file(items), "media": _digests(pairs, media), "template": request.digest, "way": way}
    told |= {"frames": str(frames), "max_new_tokens": str(max_new_tokens)}
    made_from = Fingerprint(told | _judge_parts(model, endpoint, dtype))
    work = out.with_name(f"{out.name}.unfinished")
    if is_there(out, work, made_from):
        return
    sound = _sound(pairs, media, frames, max_skipped)
    asked, talk = questions(sound, way, request), partial(_conversation, media, frames)
    with alone(work):
        claim(work, _MARKER, made_from.parts, "verdicts")
        with jsonl.Journal(work / _JOURNAL, "name") as journal:
            if left := [one for one in asked if one.name not in journal.done]:
                if endpoint is not None:
                    replies = endpoint.ask(((one.name, talk(one)) for one in left), max_new_tokens)
                else:
                    replies = _answers(Answerer(str(model), dtype, device, at_once), left, talk, max_new_tokens)
                _keep(replies, journal, len(asked))
        _finish(out, made_from, Verdicts(way, _kept(work)), sound)
        shutil.rmtree(work)


def _require(model: str | None, endpoint: Endpoint | None, frames: int, max_new_tokens: int, at_once: int) -> None:
    at_least(1, frames=frames, max_new_tokens=max_new_tokens, at_once=at_once)
    if (model is None) == (endpoint is None):
        raise ValueError(
            f"model: expected either this or endpoint, got {'neither' if model is None else 'both'}; give --model "
            "FOLDER, or --endpoint.url and --endpoint.model"
        )
    if endpoint is not None:
        endpoint.check()


def _pairs(items: Path, max_skipped: float) -> list[Comparison]:
    ledger = Ledger("items")
    pairs = RewardBench().items(items, ledger)
    log.info("%s", ledger)
    ledger.check(max_skipped)
    return pairs


def _judge_parts(model: str | None, endpoint: Endpoint | None, dtype: Number) -> dict[str, str]:
    """What stands for the judge in a fingerprint."""
    if endpoint is not None:
        return endpoint.parts()
    folder = resolved(str(model))
    return {"model": model_digest(folder), "processor": processor_digest(folder), "dtype": dtype}


def _every(pairs: Sequence[Comparison]) -> list[Media]:
    return list(dict.fromkeys(medium for pair in pairs for medium in pair.media))


def _digests(pairs: Sequence[Comparison], media: Path) -> str:
    """What stands for all media; one that cannot be read has its reason for a digest."""
    found = []
    for medium in _every(pairs):
        try:
            known = digest(media, medium)
        except MediaError as error:
            known = error.reason
        found.append([medium.kind, medium.path, known])
    return of_value(sorted(found))


def _sound(pairs: Sequence[Comparison], media: Path, frames: int, max_skipped: float) -> list[Comparison]:
    """The pairs whose media can all be shown; now, and not when a model is in memory or has been paid."""
    faults: dict[Media, str] = {}
    for medium in track(_every(pairs), "looking at media"):
        try:
            load(media, medium, frames)
        except MediaError as error:
            faults[medium] = error.reason
    ledger, sound = Ledger("media"), []
    for pair in pairs:
        ledger.took()
        if fault := next((medium for medium in pair.media if medium in faults), None):
            ledger.skip(faults[fault], f"{pair.id}: {fault.path}")
            continue
        ledger.gave()
        sound.append(pair)
    log.info("%s", ledger)
    ledger.check(max_skipped)
    if not sound:
        raise ValueError(
            f"{media}: expected media of the items, found none that can be shown ({ledger}); check --media"
        )
    return sound


def _conversation(media: Path, frames: int, asked: Question) -> list[Message]:
    """What is shown, and then the request."""
    return [Message("user", (*(load(media, medium, frames) for medium in asked.item.media), asked.text))]


def _answers(
    answerer: Answerer, asked: Sequence[Question], talk: Callable[[Question], list[Message]], most: int
) -> Generator[Reply, None, None]:
    """The answers of a checkpoint, some together."""
    for first in range(0, len(asked), answerer.at_once):
        some = asked[first : first + answerer.at_once]
        for one, answer in zip(some, answerer.answers(list(map(talk, some)), most), strict=True):
            yield Reply(one.name, answer.text, answer.asked, answer.tokens, CUT if answer.cut else "stop")


def _keep(replies: Generator[Reply, None, None], journal: jsonl.Journal, number: int) -> None:
    with closing(replies), bar() as progress:
        task = progress.add_task("judging", total=number, completed=len(journal.done))
        for reply in replies:
            journal.append(reply._asdict())
            progress.advance(task)


def _kept(work: Path) -> dict[str, Reply]:
    return {row["name"]: Reply(**row) for row in jsonl.read(work / _JOURNAL)}


def _finish(out: Path, made_from: Fingerprint, verdicts: Verdicts, items: Sequence[Comparison]) -> None:
    made_from.write(out)  # verdicts without a fingerprint would be taken for those of another tool
    number = jsonl.write(out, verdicts.rows(items))
    log.info("%s: %s rows; %s", out, f"{number:,}", verdicts.told())
