"""What each verb of the command line does: a job with progress, and what it made.

One module a verb, so that a verb imports no more than it needs.
"""
