"""Backbones, the shared prefix, losses, β schedules, the reward model and MM-DPO.

Nothing stands here yet: the room is drawn so that the house can be seen whole.
"""
