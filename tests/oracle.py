"""A decoder with a full cache, in NumPy and float64, that masks what was evicted.

Every token that a row has ever seen stays in `Row.keys` and `Row.values`; `Row.held` says which of
them each layer and head still has. A token sees what is held when it comes: keys and values of
later layers depend on that, and are never computed anew.

L layers, K KV heads, N query heads, H head dim, n tokens so far, T new ones, D model dim, V
vocabulary.
"""

import copy
from typing import Any

import numpy as np

FROZEN_POINT = 25  # PrefixKV: so many of a head's last entries of the prompt may go


class Oracle:
    """A Llama- or Qwen2-shaped model's weights (no scaled RoPE, no q/k norm)."""

    def __init__(self, model: Any):
        self.config = model.config
        self.table_VD = _of(model.embed.table_VD)
        tied = model.head_DV is None
        self.head_DV = self.table_VD.T if tied else _of(model.head_DV)
        self.final_D = _of(model.final_norm.scale_D)
        self.layers = [_layer(layer) for layer in model.layers]

    def norm(self, x: np.ndarray, scale_D: np.ndarray) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config.rms_norm_eps) * scale_D

    def rotated(self, x_TXH: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
        """RoPE: pair i of a head is turned by position * theta ** (-2 i / H)."""
        half = self.config.head_dim // 2
        turn = self.config.rope_theta ** (-np.arange(half) / half)
        angles_T1h = (positions_T[:, None] * turn)[:, None]
        left, right = x_TXH[..., :half], x_TXH[..., half:]
        cos, sin = np.cos(angles_T1h), np.sin(angles_T1h)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _of(parameter: Any) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def _layer(layer: Any) -> dict[str, np.ndarray]:
    attention, mlp = layer.attention, layer.mlp
    found = {
        "before": _of(layer.attention_norm.scale_D),
        "between": _of(layer.mlp_norm.scale_D),
        "out": _of(attention.o_XD),
        "gate": _of(mlp.gate_DF),
        "up": _of(mlp.up_DF),
        "down": _of(mlp.down_FD),
    }
    for name, weight, bias in (
        ("q", attention.q_DX, attention.q_bias_X),
        ("k", attention.k_DY, attention.k_bias_Y),
        ("v", attention.v_DY, attention.v_bias_Y),
    ):
        found[name] = _of(weight)
        found[f"{name}_bias"] = 0.0 if bias is None else _of(bias)
    return found


class Row:
    """All that one row has seen.

    Attributes:
      keys, values: `[L, K, n, H]`, as they are held: what int8 has rounded is put here, too.
      held: `[L, K, n]` which of them each layer and head still has.
      rounded: `[L, K, n]` which of them are rounded.
      prompt: tokens of the prompt, or None before it was compressed.
      ratio: `[L, K]` entries of the prompt that each head kept, where PrefixKV's ratio is kept.
      squares: `[L, N, T, n]` squared probabilities of the tokens that were fed last.
    """

    def __init__(self, oracle: Oracle):
        config = oracle.config
        heads = config.num_layers, config.num_kv_heads
        self.oracle = oracle
        self.keys = np.zeros((*heads, 0, config.head_dim))
        self.values = self.keys.copy()
        self.held = np.zeros((*heads, 0), bool)
        self.rounded = self.held.copy()
        self.prompt: int | None = None
        self.ratio: np.ndarray | None = None

    @property
    def seen(self) -> int:
        """Tokens so far."""
        return self.held.shape[-1]

    def copy(self) -> "Row":
        """A row that goes on by itself."""
        other = copy.copy(self)
        for name in ("keys", "values", "held", "rounded"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def feed(self, tokens: list[int]) -> np.ndarray:
        """Run tokens that see what is held now and one another; `[T, V]` log-probs after each."""
        model, at_T = self.oracle, self.seen + np.arange(len(tokens))
        new = (*self.held.shape[:2], len(tokens))
        self.held = np.concatenate([self.held, np.ones(new, bool)], axis=-1)
        self.rounded = np.concatenate([self.rounded, np.zeros(new, bool)], axis=-1)
        room = np.zeros((*new, self.keys.shape[-1]))
        self.keys, self.values = (
            np.concatenate([x, room], axis=2) for x in (self.keys, self.values)
        )
        layers, heads = self.held.shape[0], model.config.num_heads
        self.squares = np.zeros((layers, heads, len(tokens), self.seen))
        x_TD = model.table_VD[np.array(tokens)]
        for index, layer in enumerate(model.layers):
            x_TD = x_TD + self._attention(index, layer, model.norm(x_TD, layer["before"]), at_T)
            inner = model.norm(x_TD, layer["between"])
            gate = inner @ layer["gate"]
            x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (inner @ layer["up"])) @ layer["down"]
        logits_TV = model.norm(x_TD, model.final_D) @ model.head_DV
        peak = logits_TV.max(-1, keepdims=True)
        return logits_TV - peak - np.log(np.exp(logits_TV - peak).sum(-1, keepdims=True))

    def _attention(self, index: int, layer: dict, x_TD: np.ndarray, at_T: np.ndarray) -> np.ndarray:
        model, tokens, head_dim = self.oracle, len(at_T), self.keys.shape[-1]
        q, k, v = (
            (x_TD @ layer[name] + layer[f"{name}_bias"]).reshape(tokens, -1, head_dim)
            for name in "qkv"
        )
        q_TNH, k_TKH = model.rotated(q, at_T), model.rotated(k, at_T)
        self.keys[index][:, at_T] = k_TKH.swapaxes(0, 1)
        self.values[index][:, at_T] = v.swapaxes(0, 1)
        group = q_TNH.shape[1] // k_TKH.shape[1]
        visible_KTn = self.visible(index, at_T)
        out = []
        for head in range(q_TNH.shape[1]):
            of = head // group
            s_Tn = q_TNH[:, head] @ self.keys[index, of].T / np.sqrt(head_dim)
            s_Tn = np.where(visible_KTn[of], s_Tn, -np.inf)
            p_Tn = np.exp(s_Tn - s_Tn.max(-1, keepdims=True))
            p_Tn = p_Tn / p_Tn.sum(-1, keepdims=True)
            self.squares[index, head] = p_Tn**2
            out.append(p_Tn @ self.values[index, of])
        return np.concatenate(out, axis=-1) @ layer["out"]

    def visible(self, index: int, at_T: np.ndarray) -> np.ndarray:
        """`[K, T, n]` what queries at these positions see of a layer."""
        places_n = np.arange(self.seen)
        seen_Tn = places_n <= at_T[:, None]
        if (window := self.oracle.config.sliding_windows[index]) is not None:
            seen_Tn &= at_T[:, None] - places_n < window
        visible_KTn = self.held[index][:, None] & seen_Tn
        if self.ratio is not None:
            for head, query in np.ndindex(visible_KTn.shape[:2]):
                visible_KTn[head, query, self.gone(index, head, int(at_T[query]))] = False
        return visible_KTn

    def gone(self, index: int, head: int, seen: int) -> np.ndarray:
        """Positions that PrefixKV's ratio has taken from a head when `seen` tokens were seen.

        One by one, as many as keep the ratio, in position order from the frozen point on.
        """
        frozen, removed, _ = self._ratio(index, head, seen)
        return np.flatnonzero(self.held[index, head])[frozen : frozen + removed]

    def settle(self):
        """Evict for good, as many as keep the ratio, which is kept no longer.

        What no later token can see goes first, and is none of those that are held.
        """
        windows = self.oracle.config.sliding_windows
        for index, head in np.ndindex(self.held.shape[:2]):
            frozen, removed, kept = self._ratio(index, head, self.seen)
            held = np.flatnonzero(self.held[index, head])
            first = np.append(held, self.seen)[frozen]
            stays = held
            if (window := windows[index]) is not None:
                stays = held[held > self.seen - window]
            excess = max(0, len(stays) - (kept + self.seen - self.prompt - removed))
            gone = stays[stays >= first][:excess]
            self.held[index, head] = False
            self.held[index, head, np.setdiff1d(stays, gone)] = True
        self.ratio = None

    def _ratio(self, index: int, head: int, seen: int) -> tuple[int, int, int]:
        """Entries before the frozen point, those to be removed by now, and those of the prompt."""
        assert self.ratio is not None
        assert self.prompt is not None
        offered, kept = self.prompt, int(self.ratio[index, head])
        if (window := self.oracle.config.sliding_windows[index]) is not None:
            offered = min(offered, max(window - 1, 1))
        frozen = kept - FROZEN_POINT if kept > FROZEN_POINT else kept // 2
        grown = max(0, seen - self.prompt)
        return frozen, max(0, grown * (offered - kept) // offered), kept
