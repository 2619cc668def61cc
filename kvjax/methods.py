"""The named methods: rows of (scorer, layer allocator, head allocator, what is always kept)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Scorer = Literal[
    "none",
    "window",
    "l2-window",
    "tova",
    "accumulated",
    "expected-attention",
    "kvzip",
    "key-norm",
    "key-diff",
    "positional",
    "random",
]
LayerAllocator = Literal["uniform", "pyramid", "prefix", "global", "joint"]
HeadAllocator = Literal["uniform", "ada", "shared", "global", "joint"]
Recent = Literal["window", "half"] | int


@dataclass(frozen=True)
class Needs:
    """What a scorer reads, and what that costs.

    Attributes:
      reads: in words.
      question: whether it scores by the prompt's last queries, so that a question which comes
        after compression is not provided for.
      all_queries: whether it reads every query of the prompt, not only the last ones.
      passes: cost of prefill with scoring, in prefills.
    """

    reads: str
    question: bool = False
    all_queries: bool = False
    passes: str = "1"


SCORERS: Mapping[str, Needs] = MappingProxyType(
    {
        "none": Needs("nothing"),
        "window": Needs("last W queries", question=True),
        "l2-window": Needs("last W queries", question=True),
        "tova": Needs("last query", question=True),
        "accumulated": Needs("all queries", all_queries=True, passes="1.3"),
        "expected-attention": Needs("mean and covariance of all queries", all_queries=True),
        "kvzip": Needs("a repetition of the prompt", all_queries=True, passes="2 to 3"),
        "key-norm": Needs("keys"),
        "key-diff": Needs("keys"),
        "positional": Needs("nothing"),
        "random": Needs("nothing"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

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
      paper: the source.
    """

    scorer: Scorer
    layers: LayerAllocator = "uniform"
    heads: HeadAllocator = "uniform"
    sinks: int = 0
    recent: Recent = "window"
    keep_ratio: bool = False
    output_aware: bool = False
    chunk: int = 1
    epsilon: float = 0.0
    paper: str

    @property
    def needs(self) -> Needs:
        """What its scorer reads and costs."""
        return SCORERS[self.scorer]


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
