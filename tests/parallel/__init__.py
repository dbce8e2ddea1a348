"""Trainings on several ranks."""
