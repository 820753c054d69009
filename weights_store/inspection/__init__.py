"""Looking at the weights of a dataset: one pass over all tokens (survey), what may be wrong (doctor), and single pairs.

Reads through `WeightStore`'s tables and writes nothing into a store. Needs no tokenizer; with one, texts instead of ids.
"""
