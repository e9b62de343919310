"""Hyperparameter search: Ray Tune around :mod:`prioritycut_ray.launch.driver`.

``space`` says what is searched, ``trial`` runs one point of it, ``driver`` all of them,
``results`` and ``plots`` turn them into what people look at.
"""
