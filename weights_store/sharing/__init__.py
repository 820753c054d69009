"""Weight datasets as plain files for others, and back: data files, their record, the card, Croissant metadata.

`export`, `push` and `pull` are made of this. Nothing here talks to a hub (`train/hub/`).
"""
