"""One Delta table: shards, commits, reading a version, and exactly-once writing.

Not here: what the tables mean to each other (`checks/`, `views/`).
"""
