"""How each peer quantizes: one file per peer; its RECIPES map a name to what its docs recommend.

peers/work.py runs one recipe at one number of bits in a process of its own. bench/peers.py starts
these processes and writes the table.
"""
