"""Batching: turns single items that arrive at any time into calls of "a function from n items to n results".
`queue.py` decides what is admitted and what goes next; `batcher.py` holds the futures and the thread.
Knows nothing of images, networks or HTTP.
"""
