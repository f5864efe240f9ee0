"""Whether an op computes what its reference does, at the shapes of a model, and how fast.

`shapes` describe how a model calls the ops, `sizes` are some of them with a micro-batch, and make the cases; `verdicts`
judges cases, `measuring` has the parts: running, errors, times.
"""
