"""Load on a server that runs: requests at a chosen rate or concurrency, how long their answers took, and where it
bends. `client.py` speaks HTTP, `pictures.py` says what is sent, `generators.py` when, `summary.py` what came of it, and
`knee.py` what to make of that. Called by the command `bench`; knows a server only by its URL and nothing of ours but
`errors`, so that it takes little from the machine that it may share with the server.
"""
