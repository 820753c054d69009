"""Workers of stage anchors: another response to each prompt, and its log-probs under the reference.

`sampler.py` samples it from the reference, `mismatched.py` takes a response to another prompt.
"""
