"""Procedures: several forwards, backwards or optimizer steps per batch."""
