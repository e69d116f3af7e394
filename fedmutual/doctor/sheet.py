"""A contact sheet: some images of every class as the network sees them, and a histogram of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmutual.data.images import ImageSet
from fedmutual.data.review import sample
from fedmutual.files.atomic import atomic_write
from fedmutual.logs import shown

PER_CLASS = 8
_MOST_CLASSES = 20


def describe_pixels(images: ImageSet) -> str:
    """Return the percentiles of the values that the network sees, in one line."""
    low, median, high = np.percentile(sample(images), (1, 50, 99))
    side = images.images.shape[1]
    return (
        f"{side} x {side}, values 0 to 255: 1 % below {low:.0f}, median {median:.0f}, 99 % below {high:.0f}"
    )


def write_sheet(images: ImageSet, classes: Sequence[str], file: Path) -> None:
    """Write the sheet of a site's private images as a PNG.

    Raises
    ------
    WriteError
        The file cannot be written.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(name, np.flatnonzero(images.labels == label)) for label, name in enumerate(classes)]
    rows = [(name, found) for name, found in rows if len(found)][:_MOST_CLASSES]
    figure = Figure(figsize=(PER_CLASS, len(rows) + 2.2), layout="constrained")
    grid = figure.add_gridspec(len(rows) + 1, PER_CLASS, height_ratios=[*[1] * len(rows), 1.8])
    for row, (name, found) in enumerate(rows):
        spread = found[np.unique(np.linspace(0, len(found) - 1, min(len(found), PER_CLASS)).astype(int))]
        for column, position in enumerate(spread):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(images.images[position])
            axes.set_axis_off()
            if column == 0:
                axes.set_title(f"{shown(name)} ({len(found)})", fontsize=8, loc="left", parse_math=False)
    axes = figure.add_subplot(grid[-1, :])
    pixels = sample(images)
    for channel, colour in enumerate(("red", "green", "blue")):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256) / (pixels.size / 3)
        axes.step(np.arange(256), counts, color=colour, alpha=0.6, linewidth=1)
    axes.set(xlim=(0, 255), xlabel="value that the network sees", ylabel="share of the pixels")
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png")
    atomic_write(file, content.getvalue())
