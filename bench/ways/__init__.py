"""Ways of moving a pool's bytes into another process's pool: ours, and what it is compared to.

Each is a module with two ends, `python -m bench.ways.NAME source|sink POOL`, driven by `bench.pair`.
"""
