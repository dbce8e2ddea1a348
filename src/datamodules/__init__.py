"""Verified WebDataset shards, an order that resumes exactly, and collation to packed queries.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
