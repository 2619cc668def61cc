"""Speed on whatever device there is: `kvjax bench {decode,scores,generate}`.

`timing` measures, `presets` has the models (random weights), `decode` steps on caches of given
shapes, `scores` what compression adds to a layer, `generate` the whole path, `report` prints a
table, draws it, and ends with one JSON object.
"""
