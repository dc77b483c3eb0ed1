"""RoIServe: images in over HTTP; boxes, labels, scores and masks out. The floor plan, in walking order.

A room is a package or module below. A request moves forward one room at a time: api, workers, pipeline, imaging,
batching, inference, then masks on the way out. The future that it waits on is the only way back. Training enters at
`modeling` and never imports `api` or `batching`.

service/
├── __main__.py         `python -m service`
├── cli.py              the `roiserve` command
├── commands/           its subcommands, one file each: messages, tables and progress bars
├── cluster/            the app on Ray Serve: HTTP replicas in front of detector replicas that the cluster scales
├── app.py              create_app(settings): the only place that wires rooms together
├── workers/            device workers: supervised processes that run models, and the protocol between them
├── pipeline.py         one request: decode, submit, encode
├── api/                HTTP and JSON only: one file per resource, schemas, the error table, the web page
├── answers/            detections to the bytes of an answer, one file per form
├── imaging/            bytes to pixels; pixels to a picture with the detections drawn
├── masks/              small mask and box to RLE, polygons, pictures or brush strokes, never a full-size canvas each
├── batching/           single items to batches for a function from n items to n results: queue and batcher
├── inference/          one loaded model on one device: predictor, engines, warm-up
├── model_store/        read, check and write model folders
├── modeling/           the networks, the papers' nouns as files, parts from torchvision
├── ops/                RoI Pool, RoI Align and their kin behind one interface
├── devices/            what a CPU and a GPU can do, and how each is used, behind one interface
├── training/           data sets checked and converted, loop, evaluation
├── load/               puts load on a running server, measures it, and suggests settings from the figures
├── metrics.py          every metric, declared once
├── tracing.py          the traces of requests
├── logs.py             events with keys, one line per request
├── settings.py         every setting: environment variable, flag and help in one
├── cores.py            how many CPU cores may be used
├── memory.py           how much memory may still be taken
├── control_groups.py   the limits of containers, where both are read
├── jit.py              numeric loops to machine code, cached on disk
├── structures/         the data types that the rooms pass to each other
├── tensors.py          named arrays as bytes
├── tasks.py            runs several coroutines at a time
└── errors.py           the error tree

Imports go downwards only (`tests/test_architecture.py` checks it):

    cli → commands → cluster → app | training → api → workers → pipeline → answers → batching | imaging | masks
    | inference → model_store → modeling → ops → metrics | tracing → structures → settings | logs | jit | load | devices
    → cores | memory → control_groups | errors | tasks | tensors

`api` and `batching` never import torch, nor does the process that serves HTTP if others run its models; `modeling`
never imports `settings`; `training` never `api` or `batching`.
"""
