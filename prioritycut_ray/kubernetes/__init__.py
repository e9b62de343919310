"""Manifests for KubeRay: rendered from options, checked without a cluster, created by kubectl."""
