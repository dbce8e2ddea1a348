"""The verb `critique`: a reward model that somebody serves writes its critiques, faster than we would.

A door: rows come from the shards, the words of the request from the reward model's folder, critiques from a server.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import jsonl
from .checkpoints import resolved
from .datamodules.indexing import ranked_of
from .datamodules.scores import DATA, MODEL, VALUES
from .datamodules.scoring import chosen, is_there
from .datamodules.shards import REQUIRED
from .datamodules.written import asked
from .endpoint import CUT, FILTERED, REFUSED, Endpoint, Reply
from .fields import reason_of
from .fingerprint import Fingerprint, of_text
from .ledger import Ledger
from .modules.rewardmodel import judging_of
from .progress import track
from .provenance import model_digest
from .queries import Split
from .settings import alone, claim

if TYPE_CHECKING:
    from .datamodules.reader import Shards
    from .encoding import Message
    from .modules.rewardmodel import Judging

log = logging.getLogger(__name__)
_MARKER, _JOURNAL = "critique.json", "journal.jsonl"


def critique(
    shards: Path,
    reward: str,
    endpoint: Endpoint,
    out: Path,
    max_new_tokens: int = 512,
    splits: list[Split] | None = None,
    max_skipped: float = 0.01,
) -> None:
    """Have a served reward model write its critique of every response of a set of shards; the scores stay ours.

    The server holds the folder's body (vLLM: `configs/critique.yaml` says how). It is asked in the words and with the
    frames that the folder names, and no weights are loaded here. Run again, it continues where it was stopped; a
    finished file is left as it is.

    Args:
        shards: Folder of a finished set (`mmrlhf pack`).
        reward: The reward model that is served: folder, or name on the hub.
        endpoint: Where it is served. To vLLM films go as films (`--endpoint.films film`), as in the training.
        out: File of critiques, JSON lines; beside it is written what it was made from.
        max_new_tokens: After so many tokens a critique is cut.
        splits: Which splits; default: all that there are.
        max_skipped: The part of the queries that may be left out because they cannot be read.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}; 512 is usual")
    endpoint.check()
    folder = resolved(reward)
    judging, sets = judging_of(folder), chosen(shards, splits)
    made_from = _made_from(folder, judging, endpoint, max_new_tokens, sets)
    work = out.with_name(f"{out.name}.unfinished")
    if is_there(out, work, made_from):
        return
    with alone(work):
        claim(work, _MARKER, made_from.parts, "critiques")
        faults: dict[str, ValueError] = {}
        with jsonl.Journal(work / _JOURNAL, "name") as journal:
            talks = _conversations(sets, judging, journal.done, faults)
            with closing(endpoint.ask(talks, max_new_tokens)) as answers:
                for reply in answers:
                    journal.append(reply._asdict())
        replies = {row["name"]: Reply(**row) for row in jsonl.read(work / _JOURNAL)}
        _finish(out, made_from, sets, replies, faults, max_skipped)
        shutil.rmtree(work)


def _made_from(
    folder: Path, judging: Judging, endpoint: Endpoint, max_new_tokens: int, sets: Sequence[Shards]
) -> Fingerprint:
    told = {VALUES: "critique", MODEL: model_digest(folder), "template": judging.template.digest}
    told |= {"frames": str(judging.frames), "max_new_tokens": str(max_new_tokens)}
    # The address is left out: a served model comes up elsewhere after its machine was taken away.
    told |= {name: value for name, value in endpoint.parts().items() if name != "endpoint.url"}
    return Fingerprint(told | {f"{DATA}{one.split}": one.digest for one in sets})


def _conversations(
    sets: Sequence[Shards], judging: Judging, done: set[str], faults: dict[str, ValueError]
) -> Iterator[tuple[str, list[Message]]]:
    """What is asked about each response that is not done; `faults` gets the queries that cannot be read."""
    for one in sets:
        for number in track(range(len(one)), f"{one.split}: queries"):
            name = f"{one.split}/{number}"
            try:
                for place, talk in enumerate(asked(one[number], judging.template, judging.frames)):
                    if f"{name}/{place}" not in done:
                        yield f"{name}/{place}", talk
            except ValueError as error:
                faults[name] = error


def _finish(
    out: Path,
    made_from: Fingerprint,
    sets: Sequence[Shards],
    replies: Mapping[str, Reply],
    faults: Mapping[str, ValueError],
    max_skipped: float,
) -> None:
    """Balance the account and write the file."""
    ledger, names = Ledger("critique"), [f"{one.split}/{number}" for one in sets for number in range(len(one))]
    for name in names:
        ledger.took()
        if name in faults:
            ledger.skip(reason_of(faults[name]), name)
        else:
            ledger.gave()
    ledger.check(max_skipped)
    if faults:
        lost = ({"sample": name, "reason": reason_of(error), "message": str(error)} for name, error in faults.items())
        jsonl.write(out.with_name(f"{out.name}.rejects.jsonl"), lost)
    made_from.write(out)  # critiques without a fingerprint would be taken for those of another tool
    number = jsonl.write(out, _rows(sets, replies, faults, ledger))
    asked, said = (sum(getattr(reply, side) for reply in replies.values()) for side in ("asked", "said"))
    log.info("%s; %s: %s critiques, %s tokens read, %s written", ledger, out, f"{number:,}", f"{asked:,}", f"{said:,}")


def _rows(
    sets: Sequence[Shards], replies: Mapping[str, Reply], faults: Mapping[str, ValueError], ledger: Ledger
) -> Iterator[dict[str, Any]]:
    """A row for each response, in the order of the samples; the ledger is told of critiques that are none."""
    for one in sets:
        for number in range(len(one)):
            if f"{one.split}/{number}" in faults:
                continue
            ranked = ranked_of(jsonl.loads(one.parts(number)[REQUIRED]))
            for place, response in enumerate(ranked.responses):
                reply = replies[f"{one.split}/{number}/{place}"]
                text, cut = "" if reply.finish in (FILTERED, REFUSED) else reply.text, reply.finish == CUT
                if cut or not text:
                    ledger.fixed("critique_cut" if cut else "no_critique")
                row = {"id": ranked.query.id, "response": place, "digest": of_text(response.text)}
                yield row | {"critique": text, "cut": cut}
