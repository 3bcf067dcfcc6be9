"""Reference implementation of each method, in a file of its name: slow and obvious, with all of its options.
tests/test_methods.py compares every method with it."""
