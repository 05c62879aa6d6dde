"""The Open Inference Protocol over gRPC.

It is one more form of `/v2`: each call is passed on to a web process as a request of `/v2`.
"""
