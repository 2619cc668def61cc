"""Speed on whatever device there is: `kvjax bench {decode,scores,generate,budgets}`.

`timing` measures, `presets` has the models (random weights), `decode` steps on caches of given
shapes, `scores` what compression adds to a layer, `generate` the whole path, `budgets` shares a
budget out, `report` prints a table, draws it, and ends with one JSON object.
"""
