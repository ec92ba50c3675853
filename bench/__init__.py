"""Measurements, each paired in one run with what it is compared to. Nothing here is a test."""
