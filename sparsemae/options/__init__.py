"""Every option with its default, its limits and its help: the dataclasses that the command line is made of.

Nothing here imports torch, timm or numpy, so that ``--help``, a misspelled option or a missing folder are answered at
once.
"""
