"""Draw the contenders of a training benchmark as bars of samples/s in SVG, readable on light and
dark pages.
"""

from html import escape
from typing import Any

# pixels: width of the names, of the longest bar, height of a row
NAMES = 170
WIDTH = 420
ROW = 34


def bars(result: dict[str, Any]) -> str:
    """Return an SVG picture; each bar is labelled with its rate and its time relative to ours."""
    contenders = result["contenders"]
    most = max(figures["samples_per_second"] for figures in contenders.values())
    ranks = f" on each of {result['ranks']} ranks" if result["ranks"] > 1 else ""
    height = ROW * len(contenders) + 40
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{NAMES + WIDTH + 220}"'
            f' height="{height}" font-family="sans-serif" font-size="14">'
        ),
        (
            "<style>text { fill: #24292f } @media (prefers-color-scheme: dark) { text { fill:"
            " #d0d7de } }</style>"
        ),
        (
            f'<text x="0" y="18">training steps, {result["samples"]} samples each{ranks}:'
            " samples/s</text>"
        ),
    ]

    for number, (name, figures) in enumerate(contenders.items()):
        top = 32 + ROW * number
        rate = figures["samples_per_second"]
        length = max(1.0, WIDTH * rate / most)
        low, high = figures["time_of_ours_range"]
        label = (
            f"{rate:.2f}"
            if number == 0
            else f"{rate:.2f}  ({figures['time_of_ours']:.2f} x our time, {low:.2f} to {high:.2f})"
        )

        lines += [
            f'<text x="0" y="{top + 17}">{escape(name)}</text>',
            (
                f'<rect x="{NAMES}" y="{top}" width="{length:.1f}" height="{ROW - 10}"'
                f' fill="{"#2da44e" if number == 0 else "#8c959f"}"/>'
            ),
            f'<text x="{NAMES + length + 8:.1f}" y="{top + 17}">{escape(label)}</text>',
        ]

    return "\n".join([*lines, "</svg>", ""])
