"""Heat maps of expert use, drawn with numpy and Pillow's own font.

White is an equal share of a group's assignments, red is more and blue less, in powers
of two; grey is a group in which nothing was counted.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moe_jax.errors import UserError
from moe_jax.quality.expert_use import share

# From a quarter of an equal share to four times it, evenly in the logarithm.
_COLOURS = np.array(
    [[33, 69, 140], [118, 166, 213], [250, 250, 250], [233, 142, 112], [158, 27, 40]]
)
_NO_COUNT = (205, 205, 205)
_INK = (30, 30, 30)
_PAPER = (255, 255, 255)
_FONT_SIZE = 13
_LINE = 18
_MARGIN = 10
_LEFT = 64  # for the names of rows
_MOST_LABELS = 24


def colours(share_of: np.ndarray) -> np.ndarray:
    """Shares, 1.0 being an equal one, to uint8 (..., 3); NaN is grey."""
    with np.errstate(divide="ignore"):
        place = np.clip(np.log2(np.nan_to_num(share_of, nan=1.0)), -2, 2) + 2
    below = np.minimum(place.astype(int), 3)
    part = (place - below)[..., None]
    mixed = _COLOURS[below] * (1 - part) + _COLOURS[below + 1] * part
    grey = np.isnan(share_of)[..., None]
    return np.where(grey, _NO_COUNT, np.round(mixed)).astype(np.uint8)


def by_group(
    counts_leg: np.ndarray,
    title: str,
    group_names: Sequence[str],
    notes: Sequence[str] = (),
) -> np.ndarray:
    """A panel for each layer: experts from top to bottom, groups from left to right.

    Args:
      counts_leg: assignments (L, E, G).
      title: of the picture, such as "Experts by noise time".
      group_names: (G,), written below.
      notes: (L,), written beside the number of the layer, such as bits.

    Returns:
      uint8 (height, width, 3).

    Raises:
      UserError: there is nothing to draw, or the names do not fit.
    """
    counts_leg = _checked(counts_leg)
    layers, experts, groups = counts_leg.shape
    if len(group_names) != groups or len(notes) not in (0, layers):
        raise UserError(
            f"heat map of counts {counts_leg.shape}: {len(group_names)} names of "
            f"groups and {len(notes)} notes; needs {groups}, and {layers} or none"
        )
    tall = _cell(experts, 320, 5, 22)
    longest = max(_width(name) for name in group_names) + 8
    wide = _cell(groups, 640, 1, 48)
    panel = _LINE + experts * tall + _LINE + _MARGIN
    page = _Page(title, _LEFT + groups * wide, layers * panel)
    for layer, share_eg in enumerate(share(counts_leg)):
        top = page.top + layer * panel
        note = f"   {notes[layer]}" if notes else ""
        page.write(_LEFT, top, f"layer {layer}{note}")
        top += _LINE
        page.paste(_LEFT, top, _blocks(colours(share_eg), tall, wide))
        for e in _labelled(experts, tall, _LINE):
            page.write(_LEFT - 6, top + e * tall + tall // 2, f"expert {e}", "rm")
        for g in _labelled(groups, wide, longest):
            middle = _LEFT + g * wide + wide // 2
            page.write(middle, top + experts * tall + 2, group_names[g], "ma")
    return page.pixels()


def by_position(
    counts_lep: np.ndarray, height: int, width: int, title: str
) -> np.ndarray:
    """A row for each layer, and in it for each expert a map of the image's patches.

    Args:
      counts_lep: assignments (L, E, P), P = height * width, row by row.
      height: patches from top to bottom.
      width: patches from left to right.
      title: of the picture.

    Returns:
      uint8 (height, width, 3).

    Raises:
      UserError: there is nothing to draw, or P is another number.
    """
    counts_lep = _checked(counts_lep)
    layers, experts, positions = counts_lep.shape
    if positions != height * width:
        raise UserError(
            f"heat map of {positions} positions: they are not {height} x {width}"
        )
    side = max(1, 56 // max(height, width))
    tall, wide = height * side + _LINE + 6, width * side + 8
    page = _Page(title, _LEFT + experts * wide, layers * (tall + 4))
    maps = colours(share(counts_lep)).reshape(layers, experts, height, width, 3)
    for layer, expert in itertools.product(range(layers), range(experts)):
        left, top = _LEFT + expert * wide, page.top + layer * (tall + 4)
        page.paste(left, top + _LINE, _blocks(maps[layer, expert], side, side))
        page.write(left, top, f"e{expert}")
        if not expert:
            page.write(
                _LEFT - 6, top + _LINE + height * side // 2, f"layer {layer}", "rm"
            )
    return page.pixels()


def _checked(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 3 or not counts.size:
        raise UserError(
            f"heat map of counts {counts.shape}: needs (layers, experts, groups)"
        )
    return counts


def _cell(count: int, room: int, least: int, most: int) -> int:
    return int(np.clip(room // count, least, most))


def _blocks(colour: np.ndarray, tall: int, wide: int) -> np.ndarray:
    return colour.repeat(tall, axis=0).repeat(wide, axis=1)


def _labelled(count: int, size: int, needed: int) -> range:
    """Which of `count` cells get a name, so that names do not overlap."""
    by_number = -(-count // _MOST_LABELS)
    return range(0, count, max(by_number, -(-needed // size)))


def _font():
    return ImageFont.load_default(_FONT_SIZE)


def _width(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


class _Page:
    """White paper with a title and, below, the legend; `top` is where panels begin."""

    def __init__(self, title: str, width: int, height: int):
        self.top = _MARGIN + _LINE + _LINE + _MARGIN
        legend = _LEFT + 400
        width = max(width, legend, _LEFT + _width(title)) + 2 * _MARGIN
        size = (width, self.top + height + _MARGIN)
        self._image = Image.new("RGB", size, _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self.write(_LEFT, _MARGIN, title)
        self._legend()

    def _legend(self) -> None:
        names = ("1/4 or less", "1/2", "equal", "2 x", "4 x or more", "no tokens")
        shares = np.array([0.25, 0.5, 1, 2, 4, np.nan])
        left, top = _LEFT, _MARGIN + _LINE
        for name, colour in zip(names, colours(shares), strict=True):
            self._draw.rectangle(
                (left, top + 2, left + 12, top + 14), tuple(colour.tolist()), _INK
            )
            self.write(left + 17, top, name)
            left += 24 + _width(name)

    def write(self, left: int, top: int, text: str, anchor: str = "la") -> None:
        self._draw.text((left, top), text, _INK, font=_font(), anchor=anchor)

    def paste(self, left: int, top: int, colour: np.ndarray) -> None:
        self._image.paste(Image.fromarray(colour), (left, top))

    def pixels(self) -> np.ndarray:
        return np.asarray(self._image)
