"""Searches for good values of config fields: the search file and the trials it plans; independent of Ray."""
