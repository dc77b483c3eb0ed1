"""Device workers: whatever runs models, in this process or in supervised ones of its own. Called by `api` through the
`Detector` of `detector.py`. Knows processes and who gets which job; nothing of HTTP, and of networks only that a
`Predictor` runs them.

* `local.py`: batcher, threads and models, all in one process.
* `process.py`: that, in a worker process, at the end of a socket.
* `pool.py`: supervises such processes, routes jobs to them, and sends again what one of them left unanswered.
* `channel.py`: what they say to each other.
"""
