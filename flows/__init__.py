"""Orchestration with Prefect: order, retries, schedules and artifacts. Nothing imports this package."""
