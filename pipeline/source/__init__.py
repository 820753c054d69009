"""Rows in: read from files and the hub, brought to one pair per row, rendered and tokenised.

Not here: what is done with the pairs (`stages/prepare.py`).
"""
