"""The suite, and two programs: `python -m tests.gpu`, `python -m tests.torture`. A package: no other `tests` hides it."""
