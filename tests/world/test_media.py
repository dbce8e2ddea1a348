"""Pictures and films as bytes: the same everywhere, whole or not there, and readable by others."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mmrlhf.world import films
from mmrlhf.world.draw import FRAMES_PER_SECOND, film, mp4, picture, png
from mmrlhf.world.media import write_whole
from mmrlhf.world.scenes import draw_clip, draw_scene, stream


def test_a_png_is_stored_and_not_deflated():
    """Deflate libraries differ between machines; a stored block is what it holds."""
    data = png(picture(draw_scene(stream("png"))))
    at = data.index(b"IDAT") + 4
    assert data[at + 2] & 0b110 == 0  # the type of the first block, behind the two bytes of the zlib header
    (length,) = struct.unpack(">I", data[at - 8 : at - 4])
    image = Image.open(io.BytesIO(data))
    assert length > image.width * image.height * 3


def test_a_write_that_breaks_off_leaves_no_half_picture(tmp_path, monkeypatch):
    honest = Path.write_bytes

    def breaks_off(path, data):
        honest(path, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", breaks_off)
    with pytest.raises(OSError, match="no space left"):
        write_whole(tmp_path / "images" / "a.jpg", b"a whole picture")
    assert not (tmp_path / "images" / "a.jpg").exists()


def test_a_film_is_h264_with_all_its_frames_at_their_times():
    clip = draw_clip(stream("film"))
    with av.open(io.BytesIO(mp4(film(clip)))) as container:
        (video,) = container.streams.video
        assert video.codec_context.name == "h264"
        times = [float(frame.pts * video.time_base) for frame in container.decode(video)]
    assert times == pytest.approx([at / FRAMES_PER_SECOND for at in range(clip.frames)])


def test_a_film_keeps_its_colours(tmp_path):
    """Against the drawn frames, through the decoder's own conversion back from YUV."""
    for number in range(5):
        frames = film(draw_clip(stream("colours", number)))
        (tmp_path / "film.mp4").write_bytes(mp4(frames))
        for seen, drawn in zip(films.frames(tmp_path / "film.mp4"), frames, strict=True):
            expected = np.asarray(drawn, int)[: seen.height, : seen.width]
            assert np.abs(np.asarray(seen, int) - expected).mean() < 6
