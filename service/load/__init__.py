"""Load on a running server: requests at a chosen rate or concurrency, how long their answers took, and where the server
bends. `client.py` speaks HTTP, `pictures.py` says what is sent, `generators.py` when, `summary.py` adds up the results,
and `knee.py` draws conclusions from them. Knows a server only by its URL and imports nothing of ours but `errors`, so
that it takes little from a machine that it may share with the server.
"""
