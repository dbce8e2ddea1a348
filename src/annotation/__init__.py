"""The web application in which people score, rank and review.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
