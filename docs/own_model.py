"""kvjax with one's own Flax model: compress the keys and values of a prompt, decode from the rest.

    python docs/own_model.py

A plain decoder (RoPE, grouped queries, SwiGLU) with random weights, written without kvjax. All
that it owes to kvjax: its prefill hands out keys, values and the last queries of each layer, and
its decode step calls `kvjax.append` and `kvjax.decode_attention` where it would attend to a cache
of its own.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import kvjax

LAYERS, DIM, HEADS, KV_HEADS, WIDTH, VOCAB = 4, 128, 8, 2, 32, 1000


def rope(x, positions):
    """Rotate the halves of `[batch, tokens, heads, width]` by `[batch, tokens]` positions."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nnx.Module):
    """Attention and MLP; attention itself is passed in, so that prefill and decode share it."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(DIM, rngs=rngs) for _ in range(2)])
        self.q = nnx.LinearGeneral(DIM, (HEADS, WIDTH), use_bias=False, rngs=rngs)
        self.k = nnx.LinearGeneral(DIM, (KV_HEADS, WIDTH), use_bias=False, rngs=rngs)
        self.v = nnx.LinearGeneral(DIM, (KV_HEADS, WIDTH), use_bias=False, rngs=rngs)
        self.o = nnx.LinearGeneral((HEADS, WIDTH), DIM, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.up = nnx.Linear(DIM, 4 * DIM, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(DIM, 4 * DIM, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * DIM, DIM, use_bias=False, rngs=rngs)

    def __call__(self, x, positions, attend):
        h = self.norms[0](x)
        x = x + self.o(attend(rope(self.q(h), positions), rope(self.k(h), positions), self.v(h)))
        h = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Decoder(nnx.Module):
    """Tokens to logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(DIM, rngs=rngs)

    def head(self, x):
        return self.embed.attend(self.norm(x))

    def prefill(self, tokens, config):
        """Logits after the prompt, and its compressed cache with room for 64 tokens."""
        length = tokens.shape[1]
        wanted = kvjax.probe_request(config, length)
        keys, values, probes = [], [], []

        def attend(q, k, v):
            keys.append(k)
            values.append(v)
            probes.append(kvjax.Probe(queries=q[:, length - wanted.queries :]))
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)

        x, positions = self.embed(tokens), jnp.broadcast_to(jnp.arange(length), tokens.shape)
        for block in self.blocks:
            x = block(x, positions, attend)
        return self.head(x[:, -1]), kvjax.compress(keys, values, probes, config, tail_slots=64)

    def step(self, tokens, cache):
        """Logits after one more token of every row."""
        cache = kvjax.claim(cache, 1)
        x, positions = self.embed(tokens), kvjax.claimed_positions(cache, 1)
        for layer, block in enumerate(self.blocks):

            def attend(q, k, v, layer=layer):
                nonlocal cache
                cache = kvjax.append(cache, layer, k, v)
                return kvjax.decode_attention(q, cache, layer)

            x = block(x, positions, attend)
        return self.head(x[:, -1]), cache


def answer(model, prompt, config, tokens=32):
    """Greedy tokens, and the bytes of the prompt's keys and values."""
    logits, cache = nnx.jit(Decoder.prefill, static_argnums=2)(model, prompt, config)
    step, drawn = nnx.jit(Decoder.step), []
    for _ in range(tokens):
        drawn.append(logits.argmax(-1))
        logits, cache = step(model, drawn[-1][:, None], cache)
    return jnp.stack(drawn, axis=1), cache.nbytes


def main():
    model = Decoder(nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(1), (2, 512), 0, VOCAB)
    full, full_bytes = answer(model, prompt, kvjax.CompressionConfig.named("full"))
    print(f"{'full':<14} {full_bytes / 1024:7.0f} KiB")
    for name in ("snapkv", "ada-snapkv", "ada-prefixkv"):
        for budget in (64, 500):
            config = kvjax.CompressionConfig.named(name, budget=budget)
            tokens, held = answer(model, prompt, config, tokens=8)
            same = float((tokens == full[:, :8]).mean())
            print(f"{name:<14} {held / 1024:7.0f} KiB, {same:.0%} of the full cache's tokens")


if __name__ == "__main__":
    main()
