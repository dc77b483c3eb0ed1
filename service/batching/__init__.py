"""Batching: turns single items that arrive at any time into calls of "a function from n items to n results".
`queue.py` decides who is admitted and who goes next; `batcher.py` holds the futures and the thread.
Knows nothing of images, networks or HTTP.
"""
