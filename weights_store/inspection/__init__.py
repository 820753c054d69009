"""Looking at the weights of a dataset: a survey of all tokens, what may be wrong with them (doctor), and single pairs.

Reads through `WeightStore`'s tables and writes nothing into a store. Needs no tokenizer; with one, texts instead of ids.
"""
