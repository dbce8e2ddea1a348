"""Drills: trainings that are killed and started again as often as it takes; `make drills` runs them."""
