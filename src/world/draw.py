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

from .scenes import COLOURS, FORMS, WORDS

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
SEEN = ("nothing", *(f"{colour} {form}" for form in FORMS for colour in COLOURS), *WORDS, "hazard", "notice")
"""What a point of a picture can show."""
FRAMES_PER_SECOND = 8
Size = tuple[int, int]
Box = tuple[int, int, int, int]
Fill = int | tuple[int, int, int]


def picture(scene: Scene) -> Image.Image:
    """The scene as an RGB image."""
    image = Image.new("RGB", (scene.width, scene.height), PAINT[scene.ground])
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw_shape(draw, image.size, shape, PAINT[shape.colour])
    if scene.word:
        draw.rectangle(_plate(image.size), fill=(250, 250, 250))
        _draw_letters(image, scene.word)
    if scene.sign:
        _draw_sign(draw, image.size, scene.sign)
    return image


def label_map(scene: Scene) -> Image.Image:
    """The same scene painted with what is to be seen at each pixel: an index into `SEEN`."""
    image = Image.new("L", (scene.width, scene.height), 0)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw_shape(draw, image.size, shape, SEEN.index(shape.name))
    if scene.word:
        draw.rectangle(_plate(image.size), fill=SEEN.index(scene.word))
    if scene.sign:
        draw.rectangle(_corner(image.size), fill=SEEN.index(scene.sign))
    return image


def film(clip: Clip) -> list[Image.Image]:
    """All frames of a clip, in the order of time."""
    return [picture(clip.frame(index)) for index in range(clip.frames)]


def _draw_shape(draw: ImageDraw.ImageDraw, size: Size, shape: Shape, fill: Fill) -> None:
    half = shape.radius * min(size) // 1000
    x, y = shape.x * size[0] // 1000, shape.y * size[1] // 1000
    box = (x - half, y - half, x + half, y + half)
    if shape.form == "ring":
        draw.ellipse(box, outline=fill, width=max(half // 2, 2))
    elif shape.form == "bar":
        draw.rectangle((x - half, y - half * 2 // 5, x + half, y + half * 2 // 5), fill=fill)
    elif shape.form == "triangle":
        draw.polygon([(x - half, y + half), (x + half, y + half), (x, y - half)], fill=fill)
    else:
        thin = max(half * 2 // 5, 1)
        draw.rectangle((x - thin, y - half, x + thin, y + half), fill=fill)
        draw.rectangle((x - half, y - thin, x + half, y + thin), fill=fill)


def _plate(size: Size) -> Box:
    """Where a word stands: the lowest third."""
    width, height = size
    return width // 20, height * 70 // 100, width * 19 // 20, height * 97 // 100


def _draw_letters(image: Image.Image, word: str) -> None:
    """The word on its plate, as large as fits, in Pillow's bitmap font: FreeType's pixels differ by version."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(word)
    letters = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(letters).text((-left, -top), word, fill=255, font=font)
    letters = letters.crop(letters.getbbox())
    plate = _plate(image.size)
    tallest = (plate[3] - plate[1]) * 8 // 10
    width = min((plate[2] - plate[0]) * 9 // 10, tallest * letters.width // letters.height)
    size = (max(width, letters.width), max(width * letters.height // letters.width, letters.height))
    letters = letters.resize(size, Image.Resampling.NEAREST)
    corner = ((image.width - size[0]) // 2, (plate[1] + plate[3] - size[1]) // 2)
    image.paste((10, 10, 10), (*corner, corner[0] + size[0], corner[1] + size[1]), letters)


def _corner(size: Size) -> Box:
    """Where a sign stands: the upper right corner."""
    side = min(size) * 30 // 100
    return size[0] - side - 2, 2, size[0] - 2, 2 + side


def _draw_sign(draw: ImageDraw.ImageDraw, size: Size, sign: str) -> None:
    """A red-edged triangle warns, a blue-edged disc merely informs."""
    left, top, right, bottom = _corner(size)
    centre, side = (left + right) // 2, right - left
    width = max(side // 8, 2)
    if sign == "hazard":
        corners = [(left, bottom), (right, bottom), (centre, top)]
        draw.polygon(corners, fill=PAINT["yellow"], outline=PAINT["red"], width=width)
    else:
        draw.ellipse((left, top, right, bottom), fill=PAINT["white"], outline=PAINT["blue"], width=width)
    bar = (centre - width // 2, top + side // 3, centre + width // 2, top + side * 4 // 5)
    draw.rectangle(bar, fill=(10, 10, 10))


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
