"""Device workers: whatever runs models, in this process or in supervised ones of its own, behind the `Detector` of
`detector.py`. Knows processes and which of them gets which job; nothing of HTTP, and of networks only that a
`Predictor` runs them.

* `local.py`: batcher, threads and models, all in one process; `threads.py`: those threads.
* `process.py`: that, in a worker process, at the end of a socket; `handle.py`: the other end.
* `pool.py`: all workers together. `supervision.py` keeps one running on each device, `served_models.py` gives all the
  same models, `dispatch.py` holds the jobs until they are answered: `routing.py` decides which worker gets which job,
  `blame.py` which job a dead worker died of, and `suspects.py` remembers that.
* `channel.py`: what the processes say to each other.
"""
