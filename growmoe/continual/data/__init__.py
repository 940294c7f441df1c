"""Data of the bench: a file for each place that it comes from.

Each reader takes the data directory, or None, and gives `growmoe.continual.stream.Data`; what is
missing or damaged raises a `DataError` that says which file, and what to do.
"""
