"""Tests of models, losses and β schedules."""
