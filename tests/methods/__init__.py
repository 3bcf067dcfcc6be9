"""The plain reference of each method, in a file of its name: its definition, slow and obvious, and all of its options.
tests/test_methods.py holds every method against its own."""
