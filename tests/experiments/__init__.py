"""Tests of sweeps and their reports."""
