"""RoIServe over many machines, on Ray Serve: HTTP ingress replicas, each with the whole API, in front of detector
replicas, which the cluster places, scales and replaces. Needs the extra `ray`.
"""
