"""Raw queries in, classified, clustered and sampled queries out; whatever is dropped keeps its reason.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
