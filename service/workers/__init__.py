"""Device workers: whatever runs models, in this process or in supervised worker processes, behind the `Detector` of
`detector.py`. Knows processes and which of them gets which job; nothing of HTTP, and of networks only that a
`Predictor` runs them.

* `local.py`: batcher, threads and models, all in one process; `threads.py`: those threads.
* `process.py`: the worker process, which runs all that at one end of a socket; `handle.py`: the other end.
* `pool.py`: all workers together. `supervision.py` keeps one running on each device, `served_models.py` gives all the
  same models, `dispatch.py` holds the jobs until they are answered: `routing.py` decides which worker gets which job,
  `blame.py` which job killed a worker, and `suspects.py` remembers that.
* `channel.py`: the protocol between the processes.
"""
