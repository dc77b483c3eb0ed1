"""Engines: ways to run a network's convolutional parts (`service/modeling/parts.py`), one per file. `choosing.py` picks
the engine for a model; the code between the parts is the same for every engine.
"""
