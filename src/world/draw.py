"""Scenes to pixels, and pixels to bytes that are the same on every machine.

Shapes are drawn without antialiasing at integer positions, words with Pillow's own bitmap font (no FreeType),
JPEG with fixed tables, and H.264 with one thread, a constant quantiser and no processor-dependent choices.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .scenes import Clip, Scene, Shape

PAINT = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 225),
    "yellow": (235, 210, 40),
    "purple": (150, 50, 190),
    "white": (245, 245, 245),
    "grey": (120, 120, 120),
    "black": (25, 25, 25),
    "sand": (190, 165, 130),
}
FRAMES_PER_SECOND = 8


def picture(scene: Scene) -> Image.Image:
    """The scene as an RGB image."""
    image = Image.new("RGB", (scene.width, scene.height), PAINT[scene.ground])
    for shape in scene.shapes:
        _draw_shape(image, shape)
    if scene.word:
        _draw_word(image, scene.word)
    if scene.sign:
        _draw_sign(image, scene.sign)
    return image


def film(clip: Clip) -> list[Image.Image]:
    """All frames of a clip, in the order of time."""
    return [picture(clip.frame(index)) for index in range(clip.frames)]


def _draw_shape(image: Image.Image, shape: Shape) -> None:
    draw, paint = ImageDraw.Draw(image), PAINT[shape.colour]
    half = shape.radius * min(image.size) // 1000
    x, y = shape.x * image.width // 1000, shape.y * image.height // 1000
    box = (x - half, y - half, x + half, y + half)
    if shape.form == "circle":
        draw.ellipse(box, fill=paint)
    elif shape.form == "square":
        draw.rectangle(box, fill=paint)
    elif shape.form == "triangle":
        draw.polygon([(x - half, y + half), (x + half, y + half), (x, y - half)], fill=paint)
    else:
        thin = max(half * 2 // 5, 1)
        draw.rectangle((x - thin, y - half, x + thin, y + half), fill=paint)
        draw.rectangle((x - half, y - thin, x + half, y + thin), fill=paint)


def _draw_word(image: Image.Image, word: str) -> None:
    """A white plate over the lowest third, the word as large as fits."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(word)
    letters = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(letters).text((-left, -top), word, fill=255, font=font)
    box = letters.getbbox()
    assert box is not None
    letters = letters.crop(box)
    plate = (image.width // 20, image.height * 70 // 100, image.width * 19 // 20, image.height * 97 // 100)
    ImageDraw.Draw(image).rectangle(plate, fill=(250, 250, 250))
    width = min((plate[2] - plate[0]) * 9 // 10, (plate[3] - plate[1]) * 8 // 10 * letters.width // letters.height)
    size = (max(width, letters.width), max(width * letters.height // letters.width, letters.height))
    letters = letters.resize(size, Image.Resampling.NEAREST)
    corner = ((image.width - size[0]) // 2, (plate[1] + plate[3] - size[1]) // 2)
    image.paste((10, 10, 10), (*corner, corner[0] + size[0], corner[1] + size[1]), letters)


def _draw_sign(image: Image.Image, sign: str) -> None:
    """The upper right corner: a red-edged triangle warns, a blue-edged disc merely informs."""
    draw = ImageDraw.Draw(image)
    side = min(image.size) * 30 // 100
    left, top = image.width - side - 2, 2
    centre = left + side // 2
    width = max(side // 8, 2)
    if sign == "hazard":
        corners = [(left, top + side), (left + side, top + side), (centre, top)]
        draw.polygon(corners, fill=PAINT["yellow"], outline=PAINT["red"], width=width)
    else:
        draw.ellipse((left, top, left + side, top + side), fill=PAINT["white"], outline=PAINT["blue"], width=width)
    draw.rectangle((centre - width // 2, top + side // 3, centre + width // 2, top + side * 4 // 5), fill=(10, 10, 10))


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    """The image as a baseline JPEG with full colour resolution."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0, optimize=False)
    return out.getvalue()


def png(image: Image.Image) -> bytes:
    """The image as a PNG of stored blocks: deflate libraries differ between machines, storing does not."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=0)
    return out.getvalue()


def mp4(frames: Sequence[Image.Image]) -> bytes:
    """The frames as a real H.264 film; odd sides lose their last line, as the codec demands."""
    import av  # late: the shared libraries cost 0.2 s, and only clips need them

    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FRAMES_PER_SECOND)
        stream.codec_context.flags |= av.codec.context.Flags.bitexact.value
        stream.options = {
            "x264-params": "threads=1:cpu-independent=1:qp=18:keyint=8:no-deblock=0",
            "preset": "fast",
        }
        for index, frame in enumerate(frames):
            yuv = av.VideoFrame.from_ndarray(_yuv420(frame), format="yuv420p")
            yuv.pts = index
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())
    return out.getvalue()


def _yuv420(image: Image.Image) -> np.ndarray:
    """BT.601 in integers: the conversion inside FFmpeg may differ between processors, this one cannot."""
    width, height = (side // 2 * 2 for side in image.size)
    red, green, blue = np.asarray(image, dtype=np.int32)[:height, :width].transpose(2, 0, 1)
    luma = ((66 * red + 129 * green + 25 * blue + 128) >> 8) + 16
    chroma_blue = ((-38 * red - 74 * green + 112 * blue + 128) >> 8) + 128
    chroma_red = ((112 * red - 94 * green - 18 * blue + 128) >> 8) + 128
    halved = [
        (chroma[::2, ::2] + chroma[1::2, ::2] + chroma[::2, 1::2] + chroma[1::2, 1::2] + 2) >> 2
        for chroma in (chroma_blue, chroma_red)
    ]
    packed = np.concatenate([plane.ravel() for plane in (luma, *halved)])
    return packed.reshape(height * 3 // 2, width).astype(np.uint8)
