"""Rows in: read from files and the hub, and brought to one pair of chats per row.

Not here: how a chat becomes ids (`chat/`), and what is done with the pairs (`stages/prepare.py`).
"""
