"""Searches for good values of config fields: the search file, and the points of its space; knows no Ray."""
