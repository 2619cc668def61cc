"""Estimate what a deep model needs from programs with few of its layers."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from kvjax.plan import held
from kvjax.plan.program import Ask, Compiled

DEPTHS = (2, 6)  # layers that stand for a deep model's


def by_depth(
    compiler: Callable[[Ask], Compiled], ask: Ask, depths: tuple[int, int] = DEPTHS
) -> Compiled:
    """What a compiler says of the model with few of its layers, continued to all of them.

    Weights, pool and tail of all layers are known from shapes (`held`). What a program has beside
    them is continued along the line through both depths, or is the deeper program's where that
    line falls: a compiler that has room to spare takes more of it for the shallower one. Every
    layer adds the same collectives. Models whose layers differ, and those that are no deeper, are
    compiled whole.
    """
    layers, (low, high) = ask.model.num_layers, depths
    alike = len(set(ask.model.sliding_windows)) == 1 and ask.compression.profile is None
    if layers <= high or not alike:
        return compiler(ask)
    asks = [ask.with_layers(depth) for depth in depths]
    few, more = map(compiler, asks)
    share = Fraction(layers - low, high - low)

    def continued(said: Callable[[Compiled], int], of_shapes: Callable[[held.Held], int]) -> int:
        start, end = (
            said(program) - of_shapes(held.held(one))
            for program, one in zip((few, more), asks, strict=True)
        )
        return of_shapes(held.held(ask)) + max(end, round(start + share * (end - start)))

    start, end = Counter(few.step), Counter(more.step)
    step = [
        one
        for one in sorted(start | end)
        for _ in range(round(start[one] + share * (end[one] - start[one])))
    ]
    total = continued(lambda said: said.total, lambda has: has.weights + has.pool + has.tail)
    return Compiled(
        arguments=continued(lambda said: said.arguments, lambda has: has.weights),
        outputs=continued(lambda said: said.outputs, lambda _: 0),
        temporaries=continued(lambda said: said.temporaries, lambda has: has.pool + has.tail),
        total=total,
        refused=few.refused or more.refused or total > ask.topology.room,
        kernels=more.kernels,
        step=tuple(step),
        layers=depths,
    )
