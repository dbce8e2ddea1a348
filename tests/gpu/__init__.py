"""Tests of what runs on a GPU; most of it on a CPU, too."""
