"""How our processes begin, share work, keep out of each other's way, and leave nothing behind when they end.

Not what they compute, and nothing about weights. It lives here because every other package needs it.
"""
