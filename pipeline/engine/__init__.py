"""vLLM behind one contract. `vllm_engine.py` is the only file of the project that imports vLLM.

Not here: which pairs are scored, and where the results go (`workers/`).
"""
