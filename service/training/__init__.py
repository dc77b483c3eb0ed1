"""Training and evaluation on COCO-format data. Uses the networks and the predictor; knows nothing of HTTP or
batching.
"""
