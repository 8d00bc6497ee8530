"""The orders in which a packed matrix lies in memory, each with all that is known of it: how it is made, how it is multiplied,
how it becomes dense again.

`canonical.py` is the format's own order, which every device understands; `bitmap.py` and `strips.py` are the CPU's, with
`cpu_layout.py` for what they share; `sliced.py` and `tiled.py` are the GPU's, and `choice.py` chooses between those two.
`layout.py` says what all have in common. Torch ops that belong to a layout (`torch.ops.macko.*`) are defined beside it.
"""
