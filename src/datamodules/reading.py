"""How samples become rows: the processor of a checkpoint, what it is told, and what stands for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..checkpoints import processor_of, resolved
from ..fingerprint import of_file
from ..prompts import Template, load_template
from ..provenance import processor_digest
from .rows import Answers, Critiques, CritiqueSource
from .written import WrittenCritiques

Task = Literal["answers", "critiques"]
FRAMES = 8
"""Frames of a film where neither the config nor the processor says."""
CHAT = "chat"
"""What stands for the template of answers: the processor's own, which is among its files."""


@dataclass
class Reading:
    """How samples become rows; the processor is found and loaded when it is first needed."""

    checkpoint: str | Path
    task: Task = "answers"
    frames: int | None = None
    template: str = "critique"
    critique: CritiqueSource = "critique_or_reason"
    request: Template | None = None
    """The words of the template, where they come with a model and not by a name."""
    after: str = ""
    """What follows a critique, where a reward model reads on to there."""
    written: Path | None = None
    """A file of critiques in place of those of the data."""

    @cached_property
    def folder(self) -> Path:
        """Where the processor's files lie."""
        return resolved(self.checkpoint, weights=False)

    @cached_property
    def processor(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The checkpoint's own processor, whose code is that of transformers."""
        return processor_of(self.folder)

    @property
    def padding(self) -> int:
        """The number of the token that fills rows up."""
        number = self.processor.tokenizer.pad_token_id
        if number is None:
            raise ValueError(f"processor: expected a tokenizer with a padding token, {self.checkpoint} has none")
        return int(number)

    def encoder(self) -> Answers | Critiques:
        """From samples to rows."""
        films = getattr(self.processor, "video_processor", None)
        frames = self.frames or int(getattr(films, "num_frames", None) or FRAMES)
        if self.task == "answers":
            return Answers(self.processor, frames)
        written = WrittenCritiques(self.written).of if self.written else None
        return Critiques(self.processor, frames, self._asked, self.critique, self.after, written)

    @property
    def _asked(self) -> Template:
        """The request to judge."""
        return self.request or load_template(self.template)

    def parts(self) -> dict[str, str]:
        """What the log-probs of rows depend on, besides model and samples, as the parts of a fingerprint."""
        template = CHAT if self.task == "answers" else self._asked.digest
        frames = str(self.encoder().frames)
        return {"processor": processor_digest(self.folder), "template": template, "frames": frames}

    def digests(self) -> dict[str, Any]:
        """What the rows depend on, besides the samples."""
        judging = {"critique": of_file(self.written) if self.written else self.critique, "after": self.after}
        return {"task": self.task} | self.parts() | (judging if self.task == "critiques" else {})
