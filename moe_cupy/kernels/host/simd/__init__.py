"""Products of quantized rows with rounded activations in whole numbers, built as vector code for this CPU.

A kernel is written once, in terms of vectors of 32 bytes; an instruction set (``isa.py``) says how they are multiplied.
Read ``isa.py``, ``superblocks.py`` and ``blocks.py`` for the arithmetic, ``rows.py`` for the loop around it.
"""
