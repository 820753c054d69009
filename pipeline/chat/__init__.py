"""From a chat to ids: a model's chat template and tokenizer, and what they must not do to a row.

Not here: which columns of a source make a chat (`source/`).
"""
