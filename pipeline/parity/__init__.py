"""Is the scorer right? Compares the engine's log-probs with transformers in float32.

Each side runs in its own process (`process.py`); the verdict is in `check.py`.
"""
