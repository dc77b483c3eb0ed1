"""Load on a running server: requests at a chosen rate or concurrency, their latencies, and the rate at which the server
saturates. `client.py` speaks HTTP, `pictures.py` chooses what is sent, `generators.py` when, `summary.py` aggregates
the results, and `knee.py` draws conclusions from them. It knows a server only by its URL and imports nothing else from
this project but `errors`, to stay light on a machine that it may share with the server.
"""
