"""Benchmarks behind one small face, judges, reports.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
