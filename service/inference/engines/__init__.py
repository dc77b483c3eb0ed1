"""Engines: ways to run a network's convolutional parts (`service/modeling/parts.py`), a file each. Which one runs a
model is chosen in `choosing.py`; what lies between the parts is the same code for all.
"""
