"""Grid, run, collect; plots and the audit.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
