"""Measure speed on any device: `kvjax bench {decode,scores,generate,budgets}`.

`decode` measures steps on caches of given shapes, `scores` what compression adds to a layer,
`generate` the whole path, `budgets` the allocators. `timing` has the clock; `report` prints a
table, draws it, and ends with one JSON object. The models are those of `kvjax.models.presets`.
`check` is `make gpu-check` and `make tpu-check`.
"""
