"""The model store: folders `<name>/<version>/` with `model.toml`, `weights.safetensors` and a model card. Reads, checks
and writes them. Knows how a network is stored, not how it is built, run or served.
"""
