"""kvjax: KV-cache compression for long-context generation in JAX and Flax.

The data's path: prompt -> prefill -> score -> allocate -> pack -> decode
(`inputs`, `generation`, `compression`, `cache`).

Axis legend, obeyed by every einsum and by the names of arrays inside functions:
  B batch              N query heads        D model dimension     W observation window
  T query tokens       K KV heads           F MLP dimension       M packed slots
  S cache slots        G = N // K           L layers              V vocabulary
  H head dimension     R = G * queries      X blocks, or any axis
Local letters: C tokens of a block, E end-of-sequence ids, I images, O tokens of an answer, P parts,
Q a block of queries, U slots of the tail.
"""

from kvjax.cache.disk import load_cache, save_cache
from kvjax.cache.own_model import append, claim, claimed_positions, decode_attention
from kvjax.cache.state import Cache
from kvjax.compression.compress import compress, probe_request
from kvjax.config import CompressionConfig, ConfigError, Recompress, parse_budget
from kvjax.generation.generate import Generation, compress_prompt, generate
from kvjax.generation.prefill_once import prefill_prompts
from kvjax.generation.prefilled import PrefilledPrompts
from kvjax.generation.programs import compilations
from kvjax.generation.sampling import Sampling
from kvjax.generation.stream import Step, stream
from kvjax.generation.timing import Timings, timed_generate
from kvjax.likelihood import Scored, score
from kvjax.methods import METHODS
from kvjax.model_interface import Probe
from kvjax.models.load import load

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Cache",
    "CompressionConfig",
    "ConfigError",
    "Generation",
    "PrefilledPrompts",
    "Probe",
    "Recompress",
    "Sampling",
    "Scored",
    "Step",
    "Timings",
    "append",
    "claim",
    "claimed_positions",
    "compilations",
    "compress",
    "compress_prompt",
    "decode_attention",
    "generate",
    "load",
    "load_cache",
    "parse_budget",
    "prefill_prompts",
    "probe_request",
    "save_cache",
    "score",
    "stream",
    "timed_generate",
]
