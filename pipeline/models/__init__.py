"""The models a build needs: the starting model, an adapter merged into its base, and contrastive models in the store.

Not here: training them (`train/`, started by `stages/contrast.py`).
"""
