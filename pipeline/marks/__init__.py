"""What users and rules mark in responses: own numbers, spans, patterns and differences, and from there to token weights.

Not here: the estimators that use it (`weighing/`), and the table of a user's own weights (`stages/annotate.py`).
"""
