"""Reading films back: a video file through PyAV, or a folder of frames."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def frames(path: Path) -> list[Image.Image]:
    """All frames of a film in the order of time."""
    if path.is_dir():
        found = []
        for file in sorted(path.iterdir()):
            with Image.open(file) as image:
                found.append(image.convert("RGB"))
        return found
    import av  # late: only video files need FFmpeg

    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def sampled(film: list[Image.Image], count: int) -> list[Image.Image]:
    """Evenly spread frames, first and last among them; a short film repeats some.

    >>> sampled(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    last = len(film) - 1
    return [film[round(place * last / max(count - 1, 1))] for place in range(count)]
