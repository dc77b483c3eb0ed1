"""HTTP and JSON: reads requests, hands jobs to the pipeline, writes answers and errors. One file per resource; `app.py`
mounts their routers. Knows nothing of torch, and of images only that they are bytes.
"""
