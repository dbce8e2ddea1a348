"""Responses and critiques from local models or an API, through one resumable job store.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
