"""Timings that can be trusted: interleaved with peers and with the machine's limits, refused where results differ."""
