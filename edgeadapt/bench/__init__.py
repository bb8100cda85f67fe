"""The bench: what adaptation does for a model on its user's own data, stream by stream, with intervals.

streams say which frames come, a runner drives one model over one of them, records keep what came of every frame, scores make figures of records,
and report shows them.
"""
