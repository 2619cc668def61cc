"""How much attention each key receives: column sums of a softmax, without the matrix.

B batch, T prompt tokens (= keys), W queries, N query heads, K KV heads, H head dim.
"""

from kvjax.kernels.window_scores.reference import accumulated_scores, window_scores

__all__ = ["accumulated_scores", "window_scores"]
