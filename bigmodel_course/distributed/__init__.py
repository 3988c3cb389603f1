"""Several processes train one model: real ranks, their collectives, and the ways to divide the work."""
