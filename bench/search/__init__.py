"""`python -m bench.search`: which set of the optimizations that passed their gate is fastest on this device.

Gains do not add up, so sets are timed: forward, by adding what gains most to the best set so far, then backward, by leaving
out each member of what came of it. Every comparison is of two sets whose processes are timed in turn. No set on the way is
claimed or ships; the last one goes through the same gate as any combination.
"""
