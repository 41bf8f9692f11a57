"""Networks for where bgcbench is not: the same map of standard operations alone, in files that others read."""
