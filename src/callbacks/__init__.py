"""β and its logs, the compute ledger, crash-safe checkpoints, the consumption guard, sharding.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
