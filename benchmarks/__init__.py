"""What a call costs beside its peers: `nox -s bench`, or `python -m benchmarks.run`."""
