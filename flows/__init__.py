"""Orchestration with Prefect: order, retries, schedules and artifacts. Nothing imports this package."""

import os

# These must be set before Prefect is imported. On a busy machine the embedded server needs longer than Prefect's 20 s to start.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
# Prefect starts `python -m` for its server and for served runs: keep the current directory off their paths.
os.environ.setdefault("PYTHONSAFEPATH", "1")
