"""Holdings of branches in the memories of a model: pools of blocks and slots, and who may have which of them.

Only bookkeeping lives here; the numbers live in the backend's pools.
"""
