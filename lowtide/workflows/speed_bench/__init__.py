"""`lowtide bench speed`: a packed model beside its float model and other libraries, in turns.

turns      the parent: it starts a process for each variant and asks them for steps in turns
channel    how the parent and a variant's process talk; the standard library alone
calls      the denoiser's calls in a file, so that all variants get the same
variant    a process of lowtide's own variants
peers      other libraries, which run through bench/speed_peers.py
"""
