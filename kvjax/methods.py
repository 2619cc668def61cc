"""The named methods: rows of (scorer, layer allocator, head allocator, what is always kept)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Recent = Literal["window", "half"] | int


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What makes a method; its numbers are beside it in `Settings`.

    Attributes:
      scorer: where an entry's importance comes from (`kvjax.compression.scorers`).
      layers: how a row's budget is divided among its layers (`kvjax.compression.allocators`).
      heads: how a layer's is divided among its heads; "shared": the same tokens in all heads.
      sinks: first positions always kept.
      recent: last positions always kept: the observation window, half of the budget, or a number.
      keep_ratio: entries are masked while decoding so that the retained ratio stays (PrefixKV).
      output_aware: half of a head's entries are chosen by importance alone, the others by
        importance times what their values do to the output (CriticalKV).
      chunk: tokens that are kept or evicted together, as far as the budget divides (ChunkKV); 1
        for each on its own.
      epsilon: added to expected attention before values weigh it.
    """

    scorer: str = "window"
    layers: str = "uniform"
    heads: str = "uniform"
    sinks: int = 0
    recent: Recent = "window"
    keep_ratio: bool = False
    output_aware: bool = False
    chunk: int = 1
    epsilon: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method(Choices):
    """One row of the table.

    Attributes:
      paper: the source.
    """

    scorer: str = field()  # a row that names none is refused
    paper: str


@dataclass(frozen=True, kw_only=True)
class Settings(Choices):
    """The fields of `kvjax.config.CompressionConfig`, which documents and checks them.

    They stand below it because scorers and allocators read them, and it knows those by name.
    """

    method: str = "custom"
    budget: int | float | None = None
    window: int | None = None
    reduce: Literal["mean", "sum"] = "mean"
    pooling: Literal["max", "average", "avg", "none"] = "max"
    kernel: int = 7
    group: Literal["mean", "max"] = "mean"
    floor: float = 0.2
    head_cap: int | None = None
    beta: int = 20
    profile: tuple[float, ...] | None = None
    future: int = 512
    repeat: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    repeat_chunk: int = 2048
    layout: Literal["padded", "packed"] | None = None
    quantize: Literal["int8"] | None = None
    sums: bool = False

    @property
    def default_window(self) -> int:
        """The scorer's observation window; only a CompressionConfig knows scorers."""
        raise NotImplementedError


_SNAPKV = "SnapKV, Li et al. 2024 (arXiv 2404.14469)"
_PYRAMIDKV = "PyramidKV, Cai et al. 2024 (arXiv 2406.02069)"
_ADAKV = "Ada-KV, Feng et al. 2024 (arXiv 2407.11550)"
_PREFIXKV = "PrefixKV, Wang et al. 2024 (arXiv 2412.03409)"
_EXPECTED = "Expected Attention, Devoto et al. 2025 (arXiv 2510.00636)"
_KVZIP = "KVzip, Kim et al. 2025 (arXiv 2505.23416)"

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
        "critical-ada-snapkv": Method(
            scorer="window",
            heads="ada",
            output_aware=True,
            paper="CriticalKV, Feng et al. 2025 (arXiv 2502.03805)",
        ),
        "kv-compress": Method(
            scorer="l2-window",
            layers="global",
            heads="global",
            paper="KV-Compress, Rehg 2024 (arXiv 2410.00161)",
        ),
        "joint-snapkv": Method(
            scorer="window", layers="joint", heads="joint", paper="kvjax: PrefixKV over all heads"
        ),
        "chunk-snapkv": Method(
            scorer="window",
            heads="shared",
            chunk=10,
            paper="ChunkKV, Liu et al. 2025 (arXiv 2502.00299)",
        ),
        "tova": Method(
            scorer="tova", heads="shared", paper="TOVA, Oren et al. 2024 (arXiv 2401.06104)"
        ),
        "expected-attention": Method(
            scorer="expected-attention", sinks=4, recent=1, paper=_EXPECTED
        ),
        "ada-expected-attention": Method(
            scorer="expected-attention",
            heads="ada",
            sinks=4,
            recent=1,
            epsilon=0.01,
            paper=_EXPECTED,
        ),
        "kvzip": Method(
            scorer="kvzip", layers="global", heads="global", sinks=4, recent=1, paper=_KVZIP
        ),
        "ada-kvzip": Method(scorer="kvzip", heads="ada", sinks=4, recent=1, paper=_KVZIP),
        "joint-kvzip": Method(
            scorer="kvzip", layers="joint", heads="joint", sinks=4, recent=1, paper=_KVZIP
        ),
        "knorm": Method(scorer="key-norm", recent=1, paper="Devoto et al. 2024 (arXiv 2406.11430)"),
        "key-diff": Method(
            scorer="key-diff", recent=1, paper="KeyDiff, Park et al. 2025 (arXiv 2504.15364)"
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
