"""RoIServe: images in over HTTP; boxes, labels, scores and masks out. The floor plan, in walking order.

A request moves one room forward at a time: api, workers, pipeline, imaging, batching, inference, then masks on the way
out. The future that it waits on is the only way back. Training enters at `modeling` and never meets `api` or
`batching`.

service/
├── __main__.py         `python -m service`
├── cli.py              the `roiserve` command
├── commands/           its subcommands, a file each: words, tables and progress bars
├── cluster/            the app on Ray Serve: HTTP replicas before detector replicas that the cluster scales
├── app.py              create_app(settings): the only place that wires rooms together
├── workers/            device workers: processes that run models, supervised, and what is said between them
├── pipeline.py         one request: decode, submit, encode
├── api/                HTTP and JSON only: one file per resource, schemas, the error table, the web page
├── answers/            detections to the bytes of an answer, one file a form
├── imaging/            bytes to pixels; pixels to a picture with the detections drawn
├── masks/              small mask and box to RLE, polygons or PNG, never a full-size canvas per object
├── batching/           a function from n items to n results: queue and batcher
├── inference/          one loaded model on one device: predictor, engines, warm-up
├── model_store/        read, check and write model folders
├── modeling/           the networks, the papers' nouns as files, parts from torchvision
├── ops/                RoI Pool, RoI Align and their kin behind one interface
├── devices/            what a CPU and a GPU can do, and how each is used, behind one interface
├── training/           data sets checked and converted, loop, evaluation
├── load/               load on a server that runs, its figures, and what they say of its settings
├── metrics.py          every metric, declared once
├── tracing.py          the traces of requests
├── logs.py             events with keys, one line a request
├── settings.py         every setting: environment variable, flag and help in one
├── cores.py            how many CPU cores may be used
├── jit.py              numeric loops to machine code, kept on disk
├── structures.py       the nouns that travel between rooms
├── tensors.py          named arrays as bytes
├── tasks.py            several coroutines at a time
└── errors.py           the error tree

Imports go downwards only (`tests/test_architecture.py` holds the code to this page):

    cli → commands → cluster → app | training → api → workers → pipeline → answers → batching | imaging | masks
    | inference → model_store → modeling → ops → metrics | tracing → structures → settings | logs | jit | load | devices
    → cores | errors | tasks | tensors

`api` and `batching` never import torch, nor does the process that serves HTTP if others run its models; `modeling`
never imports `settings`; `training` never `api` or `batching`.
"""
