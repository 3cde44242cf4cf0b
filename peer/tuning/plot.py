"""A curve of losses as an SVG picture, written without a library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 28, 40
LINES = 5


def loss_plot(losses: Sequence[float], title: str) -> str:
    """The picture of one loss for each step, the first of them being step 1."""
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1.0
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + inner_width * (step - 1) / max(1, len(losses) - 1)

    def y(loss: float) -> float:
        return TOP + inner_height * (high - loss) / (high - low)

    points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in enumerate(losses, 1))
    marks = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low + (high - low) * part / (LINES - 1) for part in range(LINES))
    ]
    steps = sorted({1, (1 + len(losses)) // 2, len(losses)})
    marks += [
        f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>'
        for step in steps
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12" fill="#333">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            f'<text x="{LEFT}" y="18" font-size="14">{_plain(title)}</text>',
            *marks,
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>',
            f'<polyline points="{points}" fill="none" stroke="#c2185b" stroke-width="2"/>',
            "</svg>",
            "",
        ]
    )


def write_plot(path: Path, losses: Sequence[float], title: str) -> None:
    """The picture in a file; nothing where there is no loss yet."""
    if losses:
        path.write_text(loss_plot(losses, title), encoding="utf-8")


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
