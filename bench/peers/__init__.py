"""How each peer is asked to quantize: one file per peer, RECIPES from a name to what its documentation recommends.

peers/work.py runs one recipe at one number of bits in a process of its own; bench/peers.py starts them and draws the table.
"""
