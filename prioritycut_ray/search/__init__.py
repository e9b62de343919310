"""Hyperparameter search with Ray Tune; each trial is a training run.

``space`` is the search file, ``trial`` runs one point of the space, ``driver`` runs all of them
with Ray Tune (``pbt`` is its scheduler for Population Based Training), ``results``, ``plots`` and
``report`` show what came out.
"""
