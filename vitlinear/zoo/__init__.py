"""Checkpoints: records of facts, conversion, export, and the Hub. Importing this package imports none of its parts."""
