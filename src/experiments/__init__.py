"""Grid, run, collect: sweeps of trainings, their launchers, and what is found in them."""
