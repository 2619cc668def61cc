"""A picture of layer profiles: what each layer retains, and how prompts differ."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kvjax.calibrate import Profile
from kvjax.eval.figures import _INK, _KEPT, _NEEDLE, _figure, _save

_NUMBERED = 12  # most layers whose bars carry their number


def profiles(path: str | Path, measured: Mapping[str, Profile]) -> Path:
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
