"""What people look at: lineage, differences, exports, and one row per token.

Nothing here writes to the store.
"""
