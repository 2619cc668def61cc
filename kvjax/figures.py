"""Draw every picture; matplotlib is imported here alone (`pip install kvjax[plot]`)."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from kvjax.calibrate import Profile

_INK, _KEPT, _NEEDLE, _ASKED = "#22313f", "#2a6f97", "#f4a259", "#c1121f"


def available() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _figure(width: float | int, height: float | int, **settings):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.subplots(figsize=(width, height), layout="constrained", **settings)


def _save(figure, path: str | Path, dpi: int = 140) -> Path:
    from matplotlib import pyplot

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    made_by = "Date" if target.suffix == ".svg" else "Software"
    figure.savefig(target, dpi=dpi, metadata={made_by: None})
    pyplot.close(figure)
    return target


def heat_map(
    path: str | Path,
    kept: Mapping[str, Int[np.ndarray, "L K S"]],
    tokens: int,
    *,
    needles: Sequence[tuple[int, int]] = (),
    asked: tuple[int, int] | None = None,
    title: str = "",
) -> Path:
    """Which entries of one prompt each head kept: a panel a method, a row a head.

    Args:
      path: of the PNG.
      kept: true positions of the kept entries by method, -1 in empty slots.
      tokens: of the prompt.
      needles, asked: [first, end) of spans that are marked below the panels.
      title: above everything.
    """
    figure, axes = _figure(11, 1.15 * len(kept) + 0.9, nrows=len(kept), sharex=True, squeeze=False)
    for axis, (name, positions) in zip(axes[:, 0], kept.items(), strict=True):
        layers, heads, _ = positions.shape
        grid = np.zeros((layers * heads, tokens))
        for row, slots in enumerate(positions.reshape(layers * heads, -1)):
            grid[row, slots[slots >= 0]] = 1
        from matplotlib.colors import ListedColormap

        shades = ListedColormap(["#f3f5f7", _KEPT])
        axis.imshow(grid, aspect="auto", interpolation="nearest", cmap=shades, vmin=0, vmax=1)
        for first, end in needles:
            axis.plot([first, end - 1], [-1.2] * 2, color=_NEEDLE, lw=3, clip_on=False)
        if asked is not None:
            axis.plot([asked[0], asked[1] - 1], [-1.2] * 2, color=_ASKED, lw=4, clip_on=False)
        for layer in range(1, layers):
            axis.axhline(layer * heads - 0.5, color="white", lw=1.2)
        ticks = [layer * heads + (heads - 1) / 2 for layer in range(layers)]
        axis.set_yticks(ticks, [f"layer {layer}" for layer in range(layers)])
        axis.tick_params(length=0)
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold", pad=7)
        axis.spines[:].set_visible(False)
    axes[-1, 0].set_xlabel("position in the prompt (orange: facts, red: the one asked for)")
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)


# ---------------------------------------------------------------------------- a text
_COLUMNS = 150  # signs a line
_ADVANCE = 0.602  # width of a sign of DejaVu Sans Mono at size 1
_LINES = 90  # of a text at most
_WIDTH, _LEFT, _RIGHT = 11, 0.06, 0.98  # of the picture in inches, and of that the text


def kept_text(
    path: str | Path,
    kept: Bool[np.ndarray, "L K T"],
    words: Sequence[str],
    *,
    title: str = "",
    caption: str = "",
) -> Path:
    """What a method kept of a text: layers by positions, and the text shaded likewise.

    Args:
      path: of the PNG or SVG.
      kept: which tokens each head kept.
      words: the T pieces of text that the tokens are; after 90 lines the text is cut.
      title, caption: above everything.
    """
    lines, layers = text_lines(words, _COLUMNS)[:_LINES], kept.shape[0]
    heights = 0.62, 0.1 * layers + 0.6, 0.62, 0.165 * len(lines) + 0.15  # inches
    figure, (head, above, gap, below) = _figure(
        _WIDTH, sum(heights), nrows=4, gridspec_kw={"height_ratios": heights}
    )
    # Signs stand on their grounds only where the axes have the size that is reckoned with.
    figure.set_layout_engine(None)
    figure.subplots_adjust(left=_LEFT, right=_RIGHT, top=1, bottom=0, hspace=0)
    head.text(0, 0.5, title, fontsize=11, fontweight="bold", parse_math=False)
    head.text(0, 0.15, caption, fontsize=9, color=_INK, parse_math=False)
    image = above.imshow(
        kept.mean(1), aspect="auto", interpolation="antialiased", cmap=_shades(), vmin=0, vmax=1
    )
    above.set(ylabel="layer", yticks=range(0, layers, max(1, layers // 6)))
    above.set_xlabel("position in the document", fontsize=8)
    scale = figure.colorbar(image, cax=gap.inset_axes((0.76, 0.5, 0.2, 0.14)), location="bottom")
    scale.set_ticks([0, 0.5, 1], labels=["kept by no head", "half", "all"], fontsize=7)
    for axis in (head, gap, below):
        axis.set_axis_off()
    _draw_lines(below, lines, kept.mean((0, 1)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return _save(figure, path, dpi=100)  # text takes many bytes


def text_lines(words: Sequence[str], columns: int) -> list[list[tuple[int, str]]]:
    """The tokens of a text, each with its piece, on lines of at most `columns` signs.

    Lines end where the text's own do, or before a space; what has no space is cut between pieces.
    """
    lines: list[list[tuple[int, str]]] = [[]]
    for token, word in enumerate(words):
        for number, piece in enumerate(word.split("\n")):
            if number:
                lines.append([])
            line = lines[-1]
            if line and _width(line) + len(piece.rstrip()) > columns:
                first = _word_start(line, piece)
                if _width(line[first:]) + len(piece.rstrip()) > columns:
                    first = len(line)  # a word that is longer than a line is cut
                lines.append(line[first:])
                del line[first:]
                if lines[-1]:
                    lines[-1][0] = lines[-1][0][0], lines[-1][0][1].lstrip()
            piece = piece if lines[-1] else piece.lstrip()
            if piece:
                lines[-1].append((token, piece))
    return [line for line in lines if line]


def _width(line: Sequence[tuple[int, str]]) -> int:
    return sum(len(shown) for _, shown in line)


def _word_start(line: Sequence[tuple[int, str]], piece: str) -> int:
    """The place in a line from which on its pieces go to the next line, together with `piece`."""
    first = len(line)
    if piece[:1].isspace():
        return first
    while first > 1 and not line[first - 1][1][:1].isspace():
        first -= 1
    return first - 1 if first > 1 else len(line)


def _shades():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("kept", ["#f3f5f7", "#9cc3da", _KEPT, "#0d3b5c"])


def _draw_lines(axis, lines: Sequence[Sequence[tuple[int, str]]], share_T) -> None:
    """Each line of the text, every token on a ground that is the darker the more heads kept it."""
    from matplotlib.patches import Rectangle

    # Some first tokens are kept by every head, which would leave all others pale.
    shades, most = _shades(), max(float(np.quantile(share_T, 0.98)), 1e-9)
    # Each token for itself, as signs may be drawn up to a twentieth wider than they should be.
    font: dict[str, Any] = {"fontsize": 0.96 * _WIDTH * (_RIGHT - _LEFT) * 72 / _COLUMNS / _ADVANCE}
    font |= {"family": "DejaVu Sans Mono", "va": "center_baseline", "parse_math": False}
    axis.set(xlim=(0, _COLUMNS), ylim=(len(lines), 0))
    for row, line in enumerate(lines):
        column = 0
        for token, piece in line:
            shade = 0.6 * min(1, float(share_T[token]) / most)  # black is to be read on it
            ground = Rectangle((column, row), len(piece), 0.94, color=shades(shade), lw=0)
            axis.add_patch(ground)
            axis.text(column, row + 0.5, piece, color="black", **font)
            column += len(piece)


def dispersion(path: str | Path, counts: Float[np.ndarray, "L N"], tokens: int) -> Path:
    """Entries that each query head needs for 90 % of its attention."""
    layers, heads = counts.shape
    figure, axes = _figure(9, 2.6, ncols=layers, sharey=True, squeeze=False)
    for layer, axis in enumerate(axes[0]):
        order = np.sort(counts[layer])
        axis.bar(np.arange(heads), order, color=_KEPT)
        for place, count in enumerate(order):
            axis.text(place, count * 1.08, f"{count:.0f}", ha="center", fontsize=7, color=_INK)
        axis.set_yscale("log")
        axis.set_title(f"layer {layer}")
        axis.set_xticks([])
    axes[0, 0].set_ylabel("entries for 90 % of attention")
    figure.supxlabel(f"query heads of each layer, sorted (prompts of {tokens} tokens)", fontsize=9)
    return _save(figure, path)


def layer_losses(
    path: str | Path, losses: Mapping[str, Mapping[str, Float[np.ndarray, " L"]]]
) -> Path:
    """What eviction changes of each layer's attention output: a panel a budget, a line a method.

    Args:
      path: of the PNG.
      losses: shares of the output's norm, by the titles of panels and of lines.
    """
    figure, axes = _figure(3.6 * len(losses) + 0.6, 3.2, ncols=len(losses), squeeze=False)
    colours = [_NEEDLE, _KEPT, "#8ab6d6", _ASKED]
    for axis, (title, methods) in zip(axes[0], losses.items(), strict=True):
        for colour, (name, values) in zip(colours, methods.items(), strict=False):
            axis.plot(100 * values, label=name, color=colour, marker=".", ms=4, lw=1.2)
        axis.set_title(title, fontsize=9, fontweight="bold", loc="left")
        axis.set(xlabel="layer", ylim=(0, None))
    axes[0, 0].set_ylabel("L1 loss, % of the output's norm")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False
    )
    return _save(figure, path)


def training(path: str | Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Loss and accuracy per task over a training run's log."""
    figure, (left, right) = _figure(10, 3.4, ncols=2)
    steps = [int(row["step"]) for row in rows]
    left.plot(steps, [float(row["loss"]) for row in rows], color=_INK)
    left.set(xlabel="step", ylabel="loss, nats a weighted token", ylim=(0, None))
    known = ("step", "length", "alphabet", "loss")
    for task in (name for name in rows[0] if name not in known):
        points = [(int(row["step"]), float(row[task])) for row in rows if row[task]]
        right.plot(*zip(*points, strict=True), label=task, marker=".", ms=3, lw=1)
    right.set(xlabel="step", ylabel="answers right to the last token", ylim=(-0.02, 1.02))
    right.legend(fontsize=7, frameon=False)
    for axis in (left, right):
        previous = None
        for row in rows:
            if row["length"] != previous:
                axis.axvline(int(row["step"]), color="#d0d5da", lw=0.8, zorder=0)
                top = axis.get_ylim()[1]
                axis.text(int(row["step"]), top, f" {row['length']}", fontsize=7, va="top")
                previous = row["length"]
    return _save(figure, path)


def accuracy(
    path: str | Path,
    shares: Mapping[str, Mapping[str, Float[np.ndarray, " points"]]],
    budgets: Sequence[str],
) -> Path:
    """Share right: a panel a protocol, a row a method, a column a budget; the best on top."""
    last = list(shares.values())[-1]
    names = sorted(last, key=lambda name: -float(last[name].mean()))
    size = 2.3 * len(shares) + 2, 0.23 * len(names) + 0.9
    figure, axes = _figure(*size, ncols=len(shares), sharey=True, squeeze=False)
    for axis, (protocol, methods) in zip(axes[0], shares.items(), strict=True):
        grid = np.stack([methods[name] for name in names])
        axis.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1.25)
        for row, column in np.ndindex(*grid.shape):
            share = grid[row, column]
            ink = "white" if share > 0.8 else _INK
            axis.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=ink)
        axis.set_xticks(range(len(budgets)), budgets)
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(protocol, fontsize=9)
    figure.supxlabel("entries kept; in the cells: answers right", fontsize=8)
    return _save(figure, path)


def bench(path: str | Path, report: Mapping[str, Any]) -> Path:
    """A benchmark's milliseconds as bars, a panel a batch size; ticks where the bytes allow."""
    rows = report["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    each = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    size = 4.2 * len(batches) + 1.2, 0.32 * each + 1.1
    figure, axes = _figure(*size, ncols=len(batches), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        names = [row.get("method") or row["what"] for row in mine]
        seconds = np.array([row.get("step") or row["seconds"] for row in mine])
        axis.barh(range(len(mine)), seconds * 1e3, color=_KEPT)
        for place, row in enumerate(mine):
            axis.text(seconds[place] * 1e3, place, f" {seconds[place] * 1e3:.3g}", va="center")
            if "limit" in row:
                at = [row["limit"] * 1e3] * 2
                axis.plot(at, [place - 0.4, place + 0.4], color=_NEEDLE, lw=2)
        axis.set_yticks(range(len(mine)), names)
        axis.set_title(f"batch {batch}")
        axis.set_xlim(0, seconds.max() * 1e3 * 1.15)
    axes[0, 0].invert_yaxis()
    limits = any("limit" in row for row in rows)
    ending = "ms a decode step (orange: what the bytes allow)" if limits else "ms a layer"
    figure.supxlabel(f"{ending}; {report['settings']['model']}, {report['machine']['device']}")
    return _save(figure, path)


def served(path: str | Path, report: Mapping[str, Any]) -> Path:
    """Tokens a second of a server by method: of decode time and of the whole run.

    A tick is what the arithmetic allows, where all requests came at once; each name has the most
    rows that were answered together.
    """
    rows, bounded = report["rows"], report["settings"]["rate"] is None
    figure, axes = _figure(9, 0.5 * len(rows) + 1.1, ncols=2, sharey=True)
    panels = (
        ("of decode time", "output_per_decode_second", "decode_bound"),
        ("of the whole run", "output_per_second", "whole_bound"),
    )
    for axis, (title, value, bound) in zip(axes, panels, strict=True):
        found = np.array([row[value] for row in rows])
        bounds = np.array([row[bound] for row in rows])
        axis.barh(range(len(rows)), found, color=_KEPT)
        for place, (reached, most) in enumerate(zip(found, bounds, strict=True)):
            axis.text(max(reached, bounded * most), place, f" {reached:.1f}", va="center")
            if bounded:
                axis.plot([most] * 2, [place - 0.4, place + 0.4], color=_NEEDLE, lw=2)
        axis.set_yticks(range(len(rows)), [f"{r['method']}, {r['most_rows']} rows" for r in rows])
        axis.set_title(title)
        axis.set_xlim(0, max(found.max(), bounded * bounds.max()) * 1.2)
    axes[0].invert_yaxis()
    figure.supxlabel("output tokens a second" + " (orange: bound)" * bounded)
    return _save(figure, path)


def real_models(
    path: str | Path,
    answers: Mapping[str, Mapping[str, tuple[float | None, float | None]]],
    full: float,
    lost: Mapping[str, Sequence[float]],
    budgets: Sequence[str],
) -> Path:
    """Answers right at each budget beside a peer's, and nats lost over budgets.

    Args:
      path: of the PNG.
      answers: a panel a budget; by method the share right, kvjax's and kvpress's or None.
      full: the share right with the full cache.
      lost: nats a token more than the full cache, one a budget.
      budgets: what the points of `lost` are of.
    """
    figure, axes = _figure(12, 3.6, ncols=len(answers) + 1)
    for axis, (budget, methods) in zip(axes, answers.items(), strict=False):
        places = np.arange(len(methods))
        for offset, side, color in ((-0.2, 0, _KEPT), (0.2, 1, _NEEDLE)):
            shares = [100 * (pair[side] or 0) for pair in methods.values()]
            label = ("kvjax", "kvpress")[side]
            axis.barh(places + offset, shares, height=0.38, color=color, label=label)
            for place, (share, pair) in enumerate(zip(shares, methods.values(), strict=True)):
                if pair[side] is not None:
                    axis.text(share + 1, place + offset, f"{share:.0f}", va="center", fontsize=7)
        axis.axvline(100 * full, color=_INK, lw=1, ls="--", label="full cache")
        axis.set_yticks(places, list(methods) if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.set(xlim=(0, 105), xlabel="answers right, %")
        axis.set_title(f"question unseen, {budget} kept", fontsize=9, loc="left")
    axes[len(answers) - 1].legend(fontsize=7, frameon=False, loc="center")
    for name, values in lost.items():
        axes[-1].plot(range(len(budgets)), values, marker=".", lw=1.2, label=name)
    axes[-1].axhline(0, color=_INK, lw=1, ls="--")
    axes[-1].set_xticks(range(len(budgets)), budgets)
    axes[-1].set(xlabel="entries kept", ylabel="nats a token more than the full cache")
    axes[-1].set_title("a novel goes on", fontsize=9, loc="left")
    axes[-1].legend(fontsize=7, frameon=False)
    return _save(figure, path)


# ---------------------------------------------------------------------------- layer profiles
_NUMBERED = 12  # most layers whose bars carry their number


def layer_profiles(path: str | Path, measured: Mapping[str, Profile]) -> Path:
    """Retained % by layer, a panel a profile: bars for the mean, a faint line a prompt.

    Args:
      path: of the PNG.
      measured: profiles by the titles of their panels, at least one.
    """
    layers = max(len(profile.retained) for profile in measured.values())
    width = min(7.5, 2.6 + 0.15 * layers) * len(measured)
    figure, axes = _figure(max(5, width), 3.2, ncols=len(measured), sharey=True, squeeze=False)
    for axis, (title, profile) in zip(axes[0], measured.items(), strict=True):
        _panel(axis, profile)
        axis.set_title(title, fontsize=9, fontweight="bold", loc="left")
        axis.set_xlabel("layer")
    highest = 100 * max(profile.by_prompt.max() for profile in measured.values())
    axes[0, 0].set(ylabel="retained, % of the prompt", ylim=(0, 1.12 * highest))
    known = {label: handle for axis in axes[0] for handle, label in _legend(axis)}
    figure.legend(
        known.values(), known, loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return _save(figure, path)


def _panel(axis, profile: Profile) -> None:
    mean_L, rows_PL = 100 * np.array(profile.retained), 100 * profile.by_prompt
    places = np.arange(len(mean_L))
    axis.bar(places, mean_L, width=0.75, color=_KEPT, alpha=0.45, label="mean of the prompts")
    if len(rows_PL) > 1:
        shade = max(0.1, 0.9 / len(rows_PL) ** 0.5)
        for row in rows_PL:
            axis.plot(places, row, color=_INK, lw=0.8, alpha=shade)
        # The same line at full strength: a faint one could not be seen in the legend.
        axis.plot([], [], color=_INK, lw=0.8, label="each prompt")
    axis.axhline(mean_L.mean(), color=_NEEDLE, lw=1.4, ls="--", label="mean of the layers")
    if len(places) <= _NUMBERED:
        from matplotlib.patheffects import withStroke

        halo = [withStroke(linewidth=2.5, foreground="white")]  # a line may end in a low bar
        for place, share in zip(places, mean_L, strict=True):
            label = f"{share:.1f}"
            axis.text(place, 0.4, label, ha="center", va="bottom", fontsize=8, path_effects=halo)
    axis.set_xticks(places[:: max(1, len(places) // 16)])


def _legend(axis) -> list[tuple]:
    return list(zip(*axis.get_legend_handles_labels(), strict=True))
