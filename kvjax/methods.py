"""The named methods: rows of (scorer, layer allocator, head allocator, what is always kept)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Scorer = Literal["none", "window", "accumulated", "positional", "random"]
LayerAllocator = Literal["uniform", "pyramid", "prefix"]
HeadAllocator = Literal["uniform", "ada", "shared"]
Recent = Literal["window", "half"] | int


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Attributes:
      scorer: where an entry's importance comes from (`kvjax.scores`).
      layers: how a row's budget is divided among its layers (`kvjax.budgets`).
      heads: how a layer's is divided among its heads; "shared": the same tokens in all heads.
      sinks: first positions always kept.
      recent: last positions always kept: the observation window, half of the budget, or a number.
      keep_ratio: entries are masked while decoding so that the retained ratio stays (PrefixKV).
      paper: the source.
    """

    scorer: Scorer
    layers: LayerAllocator = "uniform"
    heads: HeadAllocator = "uniform"
    sinks: int = 0
    recent: Recent = "window"
    keep_ratio: bool = False
    paper: str


_SNAPKV = "SnapKV, Li et al. 2024 (arXiv 2404.14469)"
_PYRAMIDKV = "PyramidKV, Cai et al. 2024 (arXiv 2406.02069)"
_ADAKV = "Ada-KV, Feng et al. 2024 (arXiv 2407.11550)"
_PREFIXKV = "PrefixKV, Wang et al. 2024 (arXiv 2412.03409)"

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Method(scorer="none", paper="every entry kept"),
        "snapkv": Method(scorer="window", paper=_SNAPKV),
        "pyramidkv": Method(scorer="window", layers="pyramid", paper=_PYRAMIDKV),
        "ada-snapkv": Method(scorer="window", heads="ada", paper=_ADAKV),
        "ada-pyramid": Method(scorer="window", layers="pyramid", heads="ada", paper=_ADAKV),
        "prefixkv": Method(
            scorer="accumulated",
            layers="prefix",
            heads="shared",
            sinks=1,
            recent=1,
            keep_ratio=True,
            paper=_PREFIXKV,
        ),
        "ada-prefixkv": Method(
            scorer="window", layers="prefix", heads="ada", paper="kvjax: PrefixKV over Ada-KV"
        ),
        "h2o": Method(
            scorer="accumulated",
            recent="half",
            paper="H2O, Zhang et al. 2023 (arXiv 2306.14048)",
        ),
        "streaming-llm": Method(
            scorer="positional",
            heads="shared",
            sinks=4,
            recent=1,
            paper="StreamingLLM, Xiao et al. 2023 (arXiv 2309.17453)",
        ),
        "random": Method(scorer="random", paper="baseline"),
    }
)
