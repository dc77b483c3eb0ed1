"""HTTP and JSON: reads requests, hands jobs to the detector, writes answers and errors. One file per resource, each
with a router. Knows nothing of torch, and of images only that they are bytes or raw pixels.
"""
