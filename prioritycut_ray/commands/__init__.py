"""One thin module for each verb of the command line: progress, and a summary of the result.

Separate modules keep a verb from importing more than it needs.
"""
