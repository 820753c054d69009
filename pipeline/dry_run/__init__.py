"""What a build would do, without running it: `tokenweights plan`.

Not here: the build itself (`flows/build.py`).
"""
