"""Manifests for Kubernetes (KubeRay): rendered from one template, checked without a cluster."""
