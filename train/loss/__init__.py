"""DPO and its relatives: pure loss functions, their settings, and what each one reads.

Not here: how log-probs are computed (`model/logps.py`).
"""
