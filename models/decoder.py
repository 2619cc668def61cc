"""The decoder: Llama, Mistral, Qwen2 and Qwen3 differ by flags of the config alone.

B batch, T tokens, D model dim, V vocabulary. The model knows the cache, not compression: the
caller drives `layers[i].prefill` and does with each layer's keys and values what it likes.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvjax.cache.state import Cache
from kvjax.cache.tail import write_positions
from kvjax.model_interface import NO_IMAGES, ImageFeatures, Probe, ProbeRequest, Rotary
from kvjax.models.attention import Attention
from kvjax.models.config import ModelConfig
from kvjax.models.layers import MLP, RMSNorm, in_parts, parameter
from kvjax.sharding import constrain


class Embedding(nnx.Module):
    """Token embeddings; the output head too where they are tied."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.table_VD = parameter(rngs, (config.vocab_size, config.hidden_size), 1, dtype)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return constrain(jnp.take(self.table_VD[...], tokens_BT, axis=0, mode="clip"), "BTD")


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        eps, size = config.rms_norm_eps, config.hidden_size
        self.attention_norm = RMSNorm(size, eps, dtype=dtype)
        self.attention = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(size, eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Whole sequences without a cache."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), positions)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        request: ProbeRequest,
        rotary: Rotary | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K H"], Float[Array, "B T K H"], Probe]:
        """A whole prompt: hidden states, keys (after RoPE), values, and the probe asked for."""
        out_BTD, k_BTKH, v_BTKH, probe = self.attention.prefill(
            self.attention_norm(x_BTD), lengths, request, rotary
        )
        x_BTD = in_parts(lambda x: x + self.mlp(self.mlp_norm(x)), x_BTD + out_BTD)
        return x_BTD, k_BTKH, v_BTKH, probe

    def extend(
        self, x_BTD: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """New tokens against the cache; their keys and values are written to its tail."""
        out_BTD, cache = self.attention.extend(self.attention_norm(x_BTD), positions, cache)
        x_BTD = x_BTD + out_BTD
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD)), "BTD"), cache


class Decoder(nnx.Module):
    """A decoder-only transformer, a pytree that `jax.jit` takes as an argument.

    Args:
      config: the architecture.
      dtype: of the weights, the activations and the cache.
      rngs: for random weights; `kvjax.models.checkpoints.weights` replaces them by a checkpoint's.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                DecoderLayer(config, index, dtype=dtype, rngs=rngs)
                for index in range(config.num_layers)
            ]
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        shape = (config.hidden_size, config.vocab_size)
        tied = config.tie_word_embeddings
        self.head_DV = None if tied else parameter(rngs, shape, config.hidden_size, dtype)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """fp32 logits after every token of unpadded sequences: the forward pass of training.

        It can be differentiated; generating goes through `kvjax.generate`.
        """
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = self.embed(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, positions_BT)
        return self.logits(x_BTD)

    def logits(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
        """fp32 logits of hidden states that have left the last layer."""
        x = self.final_norm(x)
        if self.head_DV is None:
            table_VD = self.embed.table_VD[...]
            return jnp.einsum("...D,VD->...V", x, table_VD, preferred_element_type=jnp.float32)
        head_DV = self.head_DV[...]
        return jnp.einsum("...D,DV->...V", x, head_DV, preferred_element_type=jnp.float32)

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        counts: Int[Array, " B"],
        cache: Cache,
        features: ImageFeatures = NO_IMAGES,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run new tokens against the cache, at the positions that follow each row's last.

        Args:
          tokens_BT: a block, each row padded on the right.
          counts: real tokens of each row's block, 0..T.
          cache: with room for T more tail slots.
          features: of images, in place of tokens; none by default. Positions go on as text's.

        Returns:
          Hidden states for `logits` (without meaning where padded), and the cache with the block.
        """
        offset_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        positions_BT = jnp.where(
            offset_T < counts[:, None], cache.next_positions[:, None] + offset_T, -1
        )
        cache = cache.replace(
            tail=write_positions(cache.tail, positions_BT),
            next_positions=cache.next_positions + counts,
        )
        x_BTD = features.put(self.embed(tokens_BT))
        for layer in self.layers:
            x_BTD, cache = layer.extend(x_BTD, positions_BT, cache)
        return x_BTD, cache
