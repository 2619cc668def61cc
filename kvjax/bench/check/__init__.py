"""Check kernels, calls and speed on a GPU or a TPU: `make gpu-check`, `make tpu-check`.

    python -m kvjax.bench.check --platform gpu --out DIR

Parts, each with a clock of its own, from the cheapest to the longest: every kernel against float64
(`kernels`, `oracle`), every public call against the same call on the CPU (`calls`), then speed
beside the copy bandwidth of the same process (`speed`). `listed` puts them in order, `runner` runs
them in a process that may hang or die, `journal` keeps what came of each part, `needs` says what a
machine lacks.
"""
