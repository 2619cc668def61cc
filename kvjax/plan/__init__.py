"""Plan memory: what a model, a batch and a budget need of a TPU slice or a GPU.

topology.py  chips and slices        program.py   shapes, and programs compiled for them
held.py      bytes from shapes       limits.py    the most that fits, from few compilations
depth.py     few layers for many     rows.py      one row of the plan
table.py     settings, Markdown      store.py     compilations kept on disk
served.py    requests that a server answers at once
served_programs.py  a server's programs, compiled
compile_matrix.py, question_matrix.py: every kernel and many questions, for docs/compile_matrix.md
"""

from kvjax.plan.limits import Limit, largest
from kvjax.plan.program import Ask
from kvjax.plan.rows import Row, plan
from kvjax.plan.topology import TOPOLOGIES, Topology

__all__ = ["TOPOLOGIES", "Ask", "Limit", "Row", "Topology", "largest", "plan"]
