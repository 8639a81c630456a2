"""The loss over all steps as a picture (SVG): thinned but keeping extremes, with the boundaries of files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

WIDTH, HEIGHT, MARGIN = 860, 280, 44
POINTS = 400
"""How many places there are along the picture; at each, the lowest and the highest loss of its steps are drawn."""


def curve(steps: Sequence[tuple[int, float]], boundaries: Sequence[int]) -> str:
    """Return the picture.

    Args:
        steps: global step and loss, in order.
        boundaries: the last step of each file.
    """
    if not steps:
        return ""
    first, last = steps[0][0], steps[-1][0]
    losses = [loss for _, loss in steps]
    low, high = min(losses), max(losses)
    width, height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(step: int) -> float:
        return MARGIN + width * (step - first) / max(last - first, 1)

    def level(loss: float) -> float:
        return MARGIN + height * (1.0 - (loss - low) / ((high - low) or 1.0))

    path = " ".join(f"{place(step):.1f},{level(loss):.1f}" for step, loss in thinned(steps))
    marks = "".join(
        f'<line x1="{place(step):.1f}" y1="{MARGIN}" x2="{place(step):.1f}" y2="{HEIGHT - MARGIN}" stroke="#bbb"/>'
        for step in boundaries
        if first <= step < last
    )
    texts = (
        (MARGIN - 6, MARGIN + 4, "end", f"{high:.3g}"),
        (MARGIN - 6, HEIGHT - MARGIN + 4, "end", f"{low:.3g}"),
        (MARGIN, HEIGHT - MARGIN + 18, "middle", str(first)),
        (WIDTH - MARGIN, HEIGHT - MARGIN + 18, "middle", str(last)),
        (WIDTH // 2, HEIGHT - 8, "middle", "optimizer step; grey lines: boundaries of files"),
        (MARGIN, MARGIN - 14, "middle", "loss"),
    )
    labels = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#555">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{marks}\n'
        f'<polyline points="{path}" fill="none" stroke="#2563eb" stroke-width="1.2"/>\n{labels}\n</svg>\n'
    )


def thinned(steps: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most two steps for each of `POINTS` places: those of lowest and of highest loss, in order."""
    if len(steps) <= 2 * POINTS:
        return list(steps)
    cuts = [len(steps) * place // POINTS for place in range(POINTS + 1)]
    kept: list[tuple[int, float]] = []
    for start, end in pairwise(cuts):
        part = steps[start:end]
        ends = {min(part, key=lambda step: step[1]), max(part, key=lambda step: step[1])}
        kept += sorted(ends)
    return kept
