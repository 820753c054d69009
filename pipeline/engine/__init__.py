"""vLLM behind one contract. `vllm_engine.py` and `vllm_start.py` are the only files of the project that import vLLM.

Not here: which pairs are scored, and where the results go (`workers/`).
"""
