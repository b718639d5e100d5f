"""How fast attention is, beside its peers: `python -m isthmus.attention.bench`.

One run measures our implementations and whatever peers are installed on the
same arrays and the same block lists, and says what it left out and why.
"""
