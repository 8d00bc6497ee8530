"""Tuning what pruning left: the weights that are zero stay zero, the others learn.

`settings` needs no torch, `masking` is the maths, `training` the loop, `pipeline` goes from folder to folder.
"""
