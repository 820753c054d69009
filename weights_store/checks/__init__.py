"""Is the store as it was committed? `verify` with its checks of files, rows and relations, and `vacuum`.

Not here: repairing anything.
"""
